"""A real browser loads a real page, with all its scripts, styles and images, from the documentation site."""

import html
import json
import re
import shutil
import subprocess

import docset
import pytest
from support import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1000,1400"]

# Loads the page in a frame and writes down what has become of it.
PROBE = """<!doctype html><title>probe</title><pre id="report"></pre>
<iframe src="/PAGE" width="1000" height="1200" onload="report(this.contentDocument, this.contentWindow)"></iframe>
<script>
function report(page, view) {
  document.getElementById("report").textContent = JSON.stringify({
    title: page.title,
    images: Array.from(page.images, image => [image.getAttribute("src"), image.complete, image.naturalWidth]),
    sheets: Array.from(page.styleSheets, sheet => [sheet.href, sheet.cssRules.length]),
    jquery: typeof view.jQuery,
    charset: page.characterSet,
    encoded: view.performance.getEntriesByType("resource").filter(e => e.encodedBodySize < e.decodedBodySize).length,
  });
}
</script>"""


def chromium(profile, *arguments):
    return subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments], check=True, timeout=90,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_shows_a_page_with_everything_on_it(tmp_path):
    tar = shutil.copy(docset.build(), tmp_path / "docs.tar")
    if not (docset.TREE / docset.PAGE).exists():
        pytest.skip("the documentation packages could not be had, and the stand-in has no pages")
    (tmp_path / "probe.html").write_text(PROBE.replace("PAGE", docset.PAGE))
    subprocess.run(["tar", "-C", tmp_path, "-rf", tar, "./probe.html"], check=True)

    server = Server(tar, log=tmp_path / "stderr")
    page = chromium(tmp_path / "profile", "--dump-dom", f"{server.url}/probe.html").decode()
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', page, re.S)[1]))
    assert "Django" in report["title"]
    assert report["images"]
    assert all(complete and width > 0 for _, complete, width in report["images"]), report["images"]
    assert sum(rules for _, rules in report["sheets"]) > 50, report["sheets"]
    assert report["jquery"] == "function", "the scripts, symbolic links into another package, did not run"
    assert report["charset"] == "UTF-8"
    assert report["encoded"] > 0, "nothing came compressed"

    picture = tmp_path / "page.png"
    chromium(tmp_path / "profile", f"--screenshot={picture}", f"{server.url}/{docset.PAGE}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 30_000, "an empty page makes a small picture"
    server.check()
    server.stop()
