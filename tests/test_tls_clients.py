"""Clients that people use, over TLS and with real verification: curl, httpx, openssl, Python's ssl, a browser, wrk."""

import html
import http.client
import json
import re
import shutil
import ssl
import subprocess

import httpx
import pytest
from support import FILES, build_tar, request
from test_browser import CHROMIUM, chromium
from tlsclient import VERSIONS, s_client

each_version = pytest.mark.parametrize("version", VERSIONS)


def curl(server, *arguments, check=True):
    return subprocess.run(
        ["curl", "-sS", "--max-time", "30", "--noproxy", "*", "--cacert", server.root, *map(str, arguments)],
        check=check, capture_output=True, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
class TestCurl:
    @each_version
    def test_every_way_to_get_a_file(self, tls_server, tmp_path, version):
        url, only = f"{tls_server.url}/large.bin", (f"--tlsv{version}", "--tls-max", version)
        data = FILES["large.bin"]
        assert curl(tls_server, *only, url).stdout == data
        assert curl(tls_server, *only, "--http1.0", "--no-alpn", url).stdout == data
        assert curl(tls_server, *only, "-r", "-7", url).stdout == data[-7:]
        assert curl(tls_server, *only, "--compressed", f"{tls_server.url}/packed/").stdout == FILES["packed/index.html"]
        part = tmp_path / "part"
        part.write_bytes(data[:1_234_567])
        curl(tls_server, *only, "-C", "-", "-o", part, url)
        assert part.read_bytes() == data

    def test_the_name_is_verified(self, tls_server):
        """And curl offers h2 too, unasked."""
        to = f"{tls_server.port}:127.0.0.1"
        said = curl(tls_server, "-v", "--resolve", f"localhost:{to}", f"https://localhost:{tls_server.port}/next")
        assert said.stdout == FILES["next"]
        assert b"http/1.1" in said.stderr
        wrong = curl(tls_server, "--resolve", f"other.example:{to}", f"https://other.example:{tls_server.port}/next",
                     check=False)
        assert (wrong.returncode, wrong.stdout) == (60, b"")

    def test_one_connection_for_many_urls(self, tls_server):
        url = tls_server.url
        out = curl(tls_server, "-w", "|%{num_connects}|", f"{url}/next", f"{url}/dir/", f"{url}/nowhere").stdout
        assert out.count(b"|1|") == 1
        assert out.count(b"|0|") == 2

    @pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
    def test_an_upload_is_refused_and_curl_sees_why(self, tls_server, tmp_path, expect):
        (tmp_path / "upload").write_bytes(bytes(5 << 20))
        code = curl(tls_server, "-T", tmp_path / "upload", "-H", expect, "-o", "/dev/null", "-w", "%{http_code}",
                    tls_server.url).stdout
        assert code == b"405"

    def test_a_redirect_leads_to_https(self, start_tls, site):
        server = start_tls(site, "--redirect-http", "127.0.0.1:0")
        said = curl(server, "-L", "-w", "|%{url_effective}", f"http://127.0.0.1:{server.redirect_port}/dir")
        assert said.stdout == FILES["dir/index.html"] + f"|{server.url}/dir/".encode()


def test_httpx(tls_server):
    trust = ssl.create_default_context(cafile=tls_server.root)
    with httpx.Client(base_url=tls_server.url, verify=trust, trust_env=False, follow_redirects=True) as client:
        assert client.get("/dir").content == FILES["dir/index.html"]
        page = client.get("/style.css")
        assert (page.headers["Content-Encoding"], page.content) == ("br", FILES["style.css"])
        assert client.get("/large.bin").content == FILES["large.bin"]
        assert client.post("/large.bin", content=bytes(1_000_000)).status_code == 405
        assert client.get("/next").content == FILES["next"]


@each_version
def test_python(tls_server, version):
    """Sockets of Python's own, and its default context with all that it verifies."""
    trust = ssl.create_default_context(cafile=tls_server.root)
    trust.minimum_version = trust.maximum_version = VERSIONS[version]
    client = http.client.HTTPSConnection("localhost", tls_server.port, context=trust, timeout=20)
    for name in ("next", "large.bin", "n/001.txt"):
        client.request("GET", f"/{name}")
        assert client.getresponse().read() == FILES[name]
    client.close()


@each_version
def test_openssl(tls_server, version):
    said = s_client(tls_server, "-ign_eof", "-verify_return_error", "-verify_hostname", "localhost", "-alpn",
                    "h2,http/1.1", f"-tls{version.replace('.', '_')}", say=request("/next", connection="close"))
    assert "Verify return code: 0 (ok)" in said
    assert "ALPN protocol: http/1.1" in said
    assert FILES["next"].decode() in said


@pytest.mark.skipif(not shutil.which("wrk"), reason="wrk is not installed")
def test_wrk(tls_server):
    said = subprocess.run(["wrk", "-t1", "-c50", "-d1s", f"{tls_server.url}/n/042.txt"],
                          check=True, capture_output=True, text=True, timeout=30).stdout
    assert "Non-2xx" not in said and "Socket errors" not in said
    assert int(re.search(r"(\d+) requests in", said)[1]) > 100


PAGE = b"""<!doctype html><title>over TLS</title><link rel="stylesheet" href="style.css">
<img src="dot.svg"><pre id="report"></pre>
<script>const seen = {secure: isSecureContext, protocol: location.protocol}</script>
<script src="more.js"></script>
<script>
addEventListener("load", () => {
  seen.image = document.images[0].naturalWidth;
  seen.rules = document.styleSheets[0].cssRules.length;
  seen.hops = performance.getEntries().filter(e => e.nextHopProtocol).map(e => e.nextHopProtocol);
  document.getElementById("report").textContent = JSON.stringify(seen);
})
</script>"""
PAGES = {
    "index.html": PAGE,
    "style.css": b"p { color: red }\n" * 3000,
    "more.js": b"seen.script = true;\n" + b"//\n" * 90_000,
    "dot.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="17" height="17"><rect width="9" height="9"/></svg>',
}


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
@pytest.mark.parametrize("kind", ["p256", "rsa"])
def test_a_browser(start_tls, tmp_path, pairs, kind):
    """BoringSSL: another implementation than the server's. It is told the key, and verifies all but the root."""
    server = start_tls(build_tar(tmp_path / "pages.tar", PAGES), pairs=[pairs[kind]])
    page = chromium(tmp_path / "profile", f"--ignore-certificate-errors-spki-list={pairs[kind].spki}", "--dump-dom",
                    f"{server.url}/").decode()
    seen = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', page)[1]))
    assert seen == {"secure": True, "protocol": "https:", "script": True, "image": 17, "rules": 3000,
                    "hops": ["http/1.1"] * 4}
    counts = server.ended()
    assert counts.connections > 0
    assert counts.failed == 0
