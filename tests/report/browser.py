"""A page in a headless Chromium, driven over its debugging pipe: console, document, keys, names, paper and pictures."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium on PATH (Debian and Ubuntu: apt-get install chromium)"
)
_PATIENCE = 120  # seconds until an answer is given up
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40, "ArrowRight": 39}
_DRAWN = """new Promise((done) => {
  const look = setInterval(() => { if (document.body.dataset.drawn) { clearInterval(look); done(true); } }, 20);
})"""
_CONSOLE = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


@dataclass
class Tab:
    """One page that is open. ``complaints``: what it wrote to its console, and errors that nobody caught."""

    browser: Browser
    session: str
    complaints: list[str] = field(default_factory=list)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        return self.browser.send(method, self, **params)

    def run(self, script: str) -> Any:
        """The value of an expression, awaited where it is a promise."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def do(self, statements: str) -> Any:
        """Statements in an async function with `drawn()`, which waits for charts that change; their `return` value."""
        return self.run(f"(async () => {{ const drawn = () => {_DRAWN}; {statements} }})()")

    def until(self, script: str, value: Any) -> None:
        """Wait for an expression to have a value: events come some time after what sets them off."""
        end = time.monotonic() + _PATIENCE
        while (found := self.run(script)) != value:
            assert time.monotonic() < end, f"{script} is {found!r}, not {value!r}"
            time.sleep(0.02)

    def press(self, key: str, shift: bool = False) -> None:
        """Press and release a key, as a keyboard does."""
        more = {"text": "\r" if key == "Enter" else key} if key in ("Enter", " ") else {}
        common: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 * shift}
        self.send("Input.dispatchKeyEvent", type="keyDown" if more else "rawKeyDown", **common, **more)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def document(self) -> str:
        return str(self.run("document.documentElement.outerHTML"))

    def figure(self, name: str) -> str:
        """A figure's HTML."""
        found = self.run(f"document.getElementById({json.dumps(name)})?.outerHTML")
        assert found, f"no figure {name}"
        return str(found)

    def rows(self, name: str) -> int:
        """Marks that a figure's chart was drawn from."""
        found = re.search(r'data-rows="(\d+)"', self.figure(name))
        return int(found.group(1)) if found else 0

    def accessible(self) -> list[tuple[str, str]]:
        """(role, name) of all that a screen reader is told of, in its order. Names without the spaces around words."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], " ".join(node.get("name", {}).get("value", "").split()))
            for node in nodes
            if not node["ignored"]
        ]

    def colours(self, scheme: str) -> None:
        """As a reader's system has them: ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG file."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def printed(self, path: Path) -> Path:
        """The page on A4 as a PDF file."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": False}
        path.write_bytes(base64.b64decode(self.send("Page.printToPDF", **paper)["data"]))
        return path


def _told(event: dict[str, Any]) -> str:
    """What a console event says, without the stack around it."""
    parts = event.get("args") or [event.get("entry") or event.get("exceptionDetails")]
    return " ".join(str(part.get("value") or part.get("description") or part) for part in parts)


class Browser:
    """A Chromium without a network. Use it as a context; it ends with it."""

    def __init__(self, profile: Path) -> None:
        (to_it, self._write), (self._read, from_it) = os.pipe(), os.pipe()
        arguments = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        # Chromium reads its file 3 and writes its file 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{to_it} 4>&{from_it}', "-"]
        self._process = subprocess.Popen(
            [*shell, *arguments],
            pass_fds=(to_it, from_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_it)
        os.close(from_it)
        self._last, self._buffer = 0, b""
        self._tabs: dict[str, Tab] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(30)
        except (AssertionError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, tab: Tab | None = None, **params: Any) -> dict[str, Any]:
        self._last += 1
        number, message = self._last, {"id": self._last, "method": method, "params": params}
        if tab is not None:
            message["sessionId"] = tab.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE
        while True:
            answer = self._next(end, method)
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def _next(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"Chromium did not answer {method} in {_PATIENCE} s"
            more = os.read(self._read, 1 << 20)
            assert more, f"Chromium ended at {method}"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("method") in _CONSOLE and message.get("sessionId") in self._tabs:
            self._tabs[message["sessionId"]].complaints.append(_told(message["params"]))
        return message

    @contextmanager
    def open(self, page: Path, width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
        """Open a page and wait until all of its charts are drawn."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self._tabs[session] = Tab(self, session)
        for room in ("Page", "Runtime", "Log"):
            tab.send(f"{room}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        tab.send("Emulation.setDeviceMetricsOverride", **size)
        tab.colours(scheme)
        tab.send("Page.navigate", url=page.resolve().as_uri())
        end = time.monotonic() + _PATIENCE
        while tab.run("document.readyState + location.href").startswith("completeabout") or (
            tab.run("document.readyState") != "complete"
        ):
            assert time.monotonic() < end, f"{page} does not load"
            time.sleep(0.02)
        assert tab.run(_DRAWN)
        try:
            yield tab
        finally:
            del self._tabs[session]
            self.send("Target.closeTarget", targetId=target)
