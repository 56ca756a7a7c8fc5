"""A headless Chromium for tests of pages, driven through chromedriver's HTTP interface (W3C WebDriver)."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    " disable-component-update disable-sync window-size=1200,800"
)


def is_installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


class Chromium:
    """One browser with a profile of its own below `folder`; downloads go to `<folder>/downloads`."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that the browser goes with it
        )
        self.address = f"http://127.0.0.1:{port}"
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        options = {
            "binary": shutil.which("chromium"),
            "args": [f"--{switch}" for switch in f"{SWITCHES} user-data-dir={folder / 'profile'}".split()],
            "prefs": {"download.default_directory": str(self.downloads), "download.prompt_for_download": False},
        }
        try:
            self.wait(self._is_up)
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        except BaseException:
            self.close()
            raise
        self.address += f"/session/{session['sessionId']}"

    def _is_up(self) -> bool:
        try:
            return self._call("GET", "/status")["ready"]
        except OSError:
            return False

    def _call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data=data, method=method)
        with self._opener.open(request, timeout=300) as answer:
            return json.loads(answer.read())["value"]

    def wait(self, condition, seconds=300.0):
        """The first true value of `condition`."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"still {value!r} after {seconds} s"
            time.sleep(0.03)
        return value

    def open(self, address: str) -> None:
        self._call("POST", "/url", {"url": address})

    def reload(self) -> None:
        self._call("POST", "/refresh", {})

    def run(self, script: str):
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        """Real key strokes, in the element that has the focus."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def enter(self, field: str, value: str) -> None:
        """Give a field of the page a value, as a user does."""
        script = "const [field, value] = [document.getElementById({}), {}]; field.value = value;"
        script += "for (const name of ['input', 'change']) field.dispatchEvent(new Event(name))"
        self.run(script.format(json.dumps(field), json.dumps(value)))

    def screenshot(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self._call("GET", "/screenshot")))).convert("RGB"))

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()
