"""A real browser for tests of pages: Chromium, driven over pipes by the DevTools protocol.

The protocol is JSON on two pipes (https://chromedevtools.github.io/devtools-protocol/), so that no
package is needed, and no driver of the version of the browser.
"""

import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")  # programs, by their name on Debian first
TIMEOUT = 60  # seconds
# What the default actions of keys need beside their names: buttons are pressed by the letter of
# Enter, and Tab and Escape are told by their numbers.
KEYS = {
    "Enter": {"text": "\r", "windowsVirtualKeyCode": 13},
    "Escape": {"windowsVirtualKeyCode": 27},
    "Tab": {"windowsVirtualKeyCode": 9},
}


def start_browser(profile):
    """Start a browser with a folder for its profile; the test skips where none is installed."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    return Browser(program, profile)


class Browser:
    """One page in a browser without a window.

    Args:
        program: Path of Chromium.
        profile: Folder for the profile.
    """

    def __init__(self, program, profile):
        commands, self.to_browser = os.pipe()
        self.from_browser, answers = os.pipe()
        # The browser reads commands from file 3 and writes answers to file 4. Root needs
        # --no-sandbox; containers have a small /dev/shm.
        options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage"
        options += " --remote-debugging-pipe --no-first-run --disable-background-networking"
        self.process = subprocess.Popen(
            [
                *("bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", program),
                *(*options.split(), f"--user-data-dir={profile}"),
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.number, self.session, self.received = 0, None, b""
        self.messages = []  # events of the page that no call has waited for
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self.messages.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _receive(self):
        while b"\0" not in self.received:
            assert select.select([self.from_browser], [], [], TIMEOUT)[0], "the browser hangs"
            part = os.read(self.from_browser, 1 << 16)
            assert part, f"the browser ended with status {self.process.wait()}"
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, page):
        """Open a file (Path) or an address (text)."""
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.wait_for("document.readyState === 'complete'")

    def run(self, script):
        """Return the value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script):
        """Wait until an expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def resize(self, width, height, dark=False, mobile=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, kind, x, y):
        """Send a ``mouseMoved``, ``mousePressed`` or ``mouseReleased``."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def tap(self, x, y):
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            options = KEYS.get(key, {})
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **options)

    def save_downloads(self, folder):
        """Save what the page downloads in a folder, without asking."""
        options = {"behavior": "allow", "downloadPath": str(folder)}
        self.call("Browser.setDownloadBehavior", **options)

    def requests(self):
        """Return the addresses that the page asked for."""
        return [
            message["params"]["request"]["url"]
            for message in self.messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def errors(self):
        """Return what went wrong in the page: exceptions, and errors of the log."""
        return [
            message["params"]
            for message in self.messages
            if message["method"] == "Runtime.exceptionThrown"
            or (
                message["method"] == "Log.entryAdded"
                and message["params"]["entry"]["level"] == "error"
            )
        ]

    def close(self):
        os.close(self.to_browser)  # which ends the browser
        os.close(self.from_browser)
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
