"""A headless Chromium that tests drive by the DevTools protocol, over a pair of pipes."""

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MOST_SECONDS = 300
"""How long a browser may live: one that hangs is killed."""

_KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}


class Browser:
    """One tab. `complaints` are the errors and warnings of the console, and what scripts have thrown."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self.complaints: list[str] = []
        self._commands = commands
        self._answers = answers
        self._numbers = itertools.count(1)
        self._loaded = False
        self._session = ""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have a command done and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._answers.read(1)) not in (b"\0", b""):
            text += byte
        assert text, "the browser has ended"
        message = json.loads(text)
        said = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.complaints.append(str(said["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if said["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(said["args"]))
            case "Log.entryAdded":
                self.complaints.append(f"{said['entry']['level']}: {said['entry']['text']}")
        return message

    def open(self, page: Path, width: int, theme: str = "light", media: str = "") -> None:
        """Load a file into a window of so many pixels, or onto paper (`media`), for someone who prefers a theme."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self("Emulation.setEmulatedMedia", media=media, features=features)
        self._loaded = False
        self("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._read()

    def ask(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key and let it go."""
        code, text = _KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
        self("Input.dispatchKeyEvent", type="keyUp", **event)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own, and end it."""
    assert CHROMIUM is not None
    theirs_in, commands = os.pipe()
    answers, theirs_out = os.pipe()
    # It reads from descriptor 3 and writes to 4: a shell takes these numbers, and ours are out of their way.
    low = theirs_in, theirs_out
    theirs_in, theirs_out = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in low)
    process = subprocess.Popen(
        [
            *("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
            f"--user-data-dir={profile}",
        ],
        pass_fds=(theirs_in, theirs_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for each in (*low, theirs_in, theirs_out):
        os.close(each)
    watchdog = threading.Timer(MOST_SECONDS, process.kill)  # reading from it would wait for ever
    watchdog.start()
    try:
        with os.fdopen(commands, "wb", buffering=0) as writer, os.fdopen(answers, "rb") as reader:
            yield Browser(writer, reader)
    finally:
        watchdog.cancel()
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Wait until it has ended, as it does by itself once nobody is at the other end of its pipes."""
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
