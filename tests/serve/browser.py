"""Headless Chromium over its debugging protocol: open a page, read its DOM, take its picture. Works with scripts off too."""

import asyncio
import base64
import contextlib
import json
import shutil
import tempfile

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.asynccontextmanager
async def browse(url, *, scripts=True, width=1100, height=900, dark=False):
    """A page; use `await page.html()` and `await page.picture(path)`."""
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder.name}",
    ]
    words += [
        f"--window-size={width},{height}",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    words += [] if scripts else ["--blink-settings=scriptEnabled=false"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    process = await asyncio.create_subprocess_exec(CHROMIUM, *words, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(60):
            while b"DevTools listening on " not in (line := await process.stderr.readline()):
                assert line, "Chromium ended"
        port = line.split(b"ws://", 1)[1].split(b"/", 1)[0].decode()
        reader = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as http:
            async with http.get(f"http://{port}/json/list") as answer:
                target = next(item for item in await answer.json() if item["type"] == "page")
            async with http.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.call("Page.enable")
                await page.call("Page.navigate", url=url)
                yield page
        process.terminate()
        await process.wait()
        await reader
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        folder.cleanup()


class Page:
    def __init__(self, socket):
        self.socket, self.number = socket, 0

    async def call(self, method, **values):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": values})
        async with asyncio.timeout(30):
            while True:
                message = json.loads((await self.socket.receive()).data)
                if message.get("id") == self.number:
                    assert "result" in message, message
                    return message["result"]

    async def html(self):
        root = await self.call("DOM.getDocument", depth=0)
        return (await self.call("DOM.getOuterHTML", nodeId=root["root"]["nodeId"]))["outerHTML"]

    async def until(self, condition, seconds=20):
        """The page's DOM once `condition(html)` is true."""
        end = asyncio.get_running_loop().time() + seconds
        while True:
            with contextlib.suppress(AssertionError):  # the node is gone in the middle of a reload
                if condition(html := await self.html()):
                    return html
            assert asyncio.get_running_loop().time() < end, html[-3000:]
            await asyncio.sleep(0.1)

    async def picture(self, path):
        data = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(data["data"]))
