"""The limit the runner is measured against: aiohttp, a semaphore, one list of replies, one file. No rows kept, nothing judged."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp


async def main(url, rows, width, out):
    gate = asyncio.Semaphore(width)
    prompts = [json.loads(line)["messages"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def ask(messages):
            async with (
                gate,
                http.post(f"{url}/chat/completions", json={"model": "mock", "messages": messages}) as response,
            ):
                return (await response.json())["choices"][0]["message"]["content"]

        replies = await asyncio.gather(*(ask(messages) for messages in prompts))
    Path(out).write_text("".join(json.dumps(reply) + "\n" for reply in replies), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
