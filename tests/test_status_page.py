"""The status page in a real browser, which tells over its pipe of the DevTools protocol what has become of it."""

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time

import pytest
from support import PATIENCE, build_tar, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"]
COMMANDS, ANSWERS = 3, 4        # the descriptors that --remote-debugging-pipe is about; messages end with NUL

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")


class Browser:
    """Chromium with one page, and the DevTools protocol to talk about it."""

    def __init__(self, profile):
        theirs, self.commands = os.pipe()
        self.answers, told = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs, told)]

        def set_up():
            os.dup2(ends[0], COMMANDS)
            os.dup2(ends[1], ANSWERS)

        self.process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        preexec_fn=set_up, pass_fds=(COMMANDS, ANSWERS))
        for end in (theirs, told, *ends):
            os.close(end)
        self.number, self.received, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def message(self, deadline):
        while b"\0" not in self.received:
            ready, _, _ = select.select([self.answers], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self.answers, 1 << 16) if ready else b""
            assert piece, "the browser says nothing more"
            self.received += piece
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        deadline = time.monotonic() + 60
        while (message := self.message(deadline)).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    def load(self, url):
        """Open a page and wait until all of it is there."""
        self.call("Page.stopLoading")
        self.events.clear()
        begun = self.call("Page.navigate", url=url)
        assert "errorText" not in begun
        deadline = time.monotonic() + PATIENCE
        while not any(event["name"] == "load" and event["loaderId"] == begun["loaderId"]
                      for event in self.seen("Page.lifecycleEvent")):
            self.events.append(self.message(deadline))

    def seen(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def number_of(self, what):
        """What stands in the table beside these words; None where they are not there, or the page just reloads."""
        return self.value(f"""Array.from(document.querySelectorAll("tr"))
            .filter(row => row.cells[0].textContent == {json.dumps(what)}).map(row => row.cells[1].innerText)[0]""")

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)


@pytest.fixture(scope="module")
def shared_browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(shared_browser):
    yield shared_browser
    shared_browser.call("Emulation.clearDeviceMetricsOverride")
    shared_browser.call("Emulation.setEmulatedMedia", features=[])
    shared_browser.load("about:blank")      # or it would go on asking


def begin(start, tar, *flags):
    """(a Server, the address of its status page)"""
    server = start(tar, "--status", "127.0.0.1:0", *flags)
    return server, re.fullmatch(r"tarweb: status on (\S+)\n", server.read_line(10))[1]


def test_it_shows_what_goes_on(start, site, browser):
    server, url = begin(start, site)
    browser.load(url)
    assert browser.value("document.title") == "tarweb: ready"
    assert browser.value("document.compatMode") == "CSS1Compat", "quirks"
    assert browser.value("document.querySelector('h1').innerText").startswith("tarweb ")
    assert browser.value("document.querySelector('.state').innerText") == "ready"
    assert browser.value("document.characterSet") == "UTF-8"
    assert browser.number_of("responses: 2xx") == "0"
    for _ in range(3):
        server.fetch("/next")
    server.fetch("/missing")
    wait_until(lambda: browser.number_of("responses: 2xx") == "3")     # without our doing: it reloads itself
    assert browser.number_of("responses: 4xx") == "1"
    assert browser.number_of("workers: serving") == "1"


def test_it_needs_nothing_else_and_its_style_is_let_in(start, site, browser):
    _, url = begin(start, site)
    browser.load(url)
    assert browser.value("getComputedStyle(document.querySelector('.state')).borderLeftWidth") != "0px"
    assert browser.value("document.styleSheets[0].cssRules.length") > 5
    asked = {event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")}
    assert asked == {url}
    assert not browser.seen("Log.entryAdded"), "the console has something to say"
    assert not browser.seen("Runtime.exceptionThrown")


def test_a_style_of_another_hash_would_not_be(start, site, browser):
    """That is: the policy is there, and the test before this one would notice."""
    _, url = begin(start, site)
    browser.load(url)
    browser.value("""document.head.appendChild(document.createElement("style")).textContent = "p { color: red }" """)
    wait_until(lambda: browser.value("1") and browser.seen("Log.entryAdded"))
    assert "Content Security Policy" in browser.seen("Log.entryAdded")[0]["entry"]["text"]


@pytest.mark.parametrize("width", [320, 390, 1600])
def test_it_fits(start, tmp_path, browser, width):
    tar = build_tar(tmp_path / f"{'a-long-name-' * 8}.tar", {"next": b"the next one"})
    _, url = begin(start, tar)
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=2, mobile=width < 500)
    browser.load(url)
    assert browser.value("window.innerWidth") == width, "a page that is wider is zoomed out on a phone"
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("""Array.from(document.querySelectorAll(".groups td"))
        .every(cell => cell.getBoundingClientRect().right <= window.innerWidth)""")
    assert browser.value("parseFloat(getComputedStyle(document.body).fontSize)") >= 14


@pytest.mark.parametrize(("scheme", "ink"), [("light", "rgb(0, 0, 0)"), ("dark", "rgb(255, 255, 255)")])
def test_light_and_dark(start, site, browser, scheme, ink):
    _, url = begin(start, site)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.load(url)
    assert browser.value("getComputedStyle(document.body).color") == ink
    picture = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000, "an empty page makes a small picture"


def test_a_failed_reload_and_names_full_of_html(start, tmp_path, browser):
    name = "<img src=x onerror=document.title='owned'><script>document.title='owned'<\u2215script>.tar"
    tar = build_tar(tmp_path / name, {"next": b"the next one"})
    server, url = begin(start, tar)
    tar.with_name("bad.tar").write_bytes(b"no tar" * 1000)
    os.replace(tar.with_name("bad.tar"), tar)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload failed" in server.stderr())
    browser.load(url)
    state = browser.value("document.querySelector('.state').innerText")
    assert state.startswith("ready; the last reload failed: ")
    assert name in state
    assert browser.value("document.title") == "tarweb: ready"
    assert name in browser.value("document.querySelector('.wide td').textContent")
    assert browser.value("document.querySelectorAll('img, script').length") == 0
    assert browser.value("document.querySelector('.state').className") == "state bad"
