"""A headless Chromium, spoken to through pipes: what it logs, asks for, measures and draws.

Source: https://chromedevtools.github.io/devtools-protocol (Page, Emulation, Runtime, Network)
"""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 60.0
# The browser reads from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
r, w = (fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3])
os.dup2(r, 3)
os.dup2(w, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def program() -> str | None:
    """The browser, if there is one."""
    return next((found for name in _PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page in a browser.

    Attributes:
        events: all that it told, as the protocol has it.
    """

    def __init__(self, sent: int, heard: int) -> None:
        self._sent, self._heard = sent, heard
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command, and what it answers."""
        self._number += 1
        told: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            told["sessionId"] = self._session
        os.write(self._sent, json.dumps(told).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, file: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Show a file in a window of this size."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not any(each["method"] == "Page.loadEventFired" for each in self.events):
            self.events.append(self._message())

    def value(self, script: str) -> Any:
        """What an expression is on the page, once it is known."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> Image.Image:
        """What the window shows."""
        data = self.ask("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def complaints(self) -> list[dict[str, Any]]:
        """Errors and warnings: of scripts, of the policy, of what can't be loaded."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [each for each in self.events if each["method"] in kinds]

    def requests(self) -> list[str]:
        """All addresses that were asked for."""
        asked = [each for each in self.events if each["method"] == "Network.requestWillBeSent"]
        return [str(each["params"]["request"]["url"]) for each in asked]

    def _message(self) -> dict[str, Any]:
        limit = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._heard], [], [], max(0.0, limit - time.monotonic()))
            assert ready, "the browser says nothing"
            more = os.read(self._heard, 1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser that finds no other machine, with its profile in `folder`."""
    found = program()
    assert found is not None
    read_end, sent = os.pipe()
    heard, write_end = os.pipe()
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}",
        "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip
    launched = [sys.executable, "-c", _LAUNCH, str(read_end), str(write_end), found, *options]
    with subprocess.Popen(
        launched,
        pass_fds=(read_end, write_end),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(read_end)
        os.close(write_end)
        try:
            yield Browser(sent, heard)
        finally:
            os.close(sent)
            os.close(heard)
            process.terminate()
            process.wait(timeout=30)
