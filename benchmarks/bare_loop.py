"""The limit the runner is measured against: aiohttp, a semaphore, one list of replies, one file. No rows kept, nothing judged."""
import asyncio
import json
import sys

import aiohttp


async def main(url, rows, width, out):
    gate = asyncio.Semaphore(width)
    prompts = [json.loads(line)["messages"] for line in open(rows, encoding="utf-8")]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        async def ask(messages):
            async with gate, http.post(f"{url}/chat/completions", json={"model": "mock", "messages": messages}) as response:
                return (await response.json())["choices"][0]["message"]["content"]
        replies = await asyncio.gather(*(ask(messages) for messages in prompts))
    with open(out, "w", encoding="utf-8") as file:
        for reply in replies:
            file.write(json.dumps(reply) + "\n")

if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
