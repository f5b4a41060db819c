"""Clients that people use: curl, httpx, and two hundred connections at once."""

import asyncio
import itertools
import shutil
import subprocess

import brotli
import httpx
import pytest
from support import FILES, LAST_MODIFIED, request

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


def curl(*arguments):
    return subprocess.run(["curl", "-sS", "--max-time", "30", "--noproxy", "*", *map(str, arguments)], check=True,
                          capture_output=True, stdin=subprocess.DEVNULL).stdout


@needs_curl
class TestCurl:
    def test_every_way_to_get_a_file(self, server, tmp_path):
        url = f"{server.url}/large.bin"
        assert curl(url) == FILES["large.bin"]
        assert curl("--http1.0", url) == FILES["large.bin"]
        assert curl("-r", "5-99", url) == FILES["large.bin"][5:100]
        assert curl("-r", "-7", url) == FILES["large.bin"][-7:]
        part = tmp_path / "part"
        part.write_bytes(FILES["large.bin"][:1_234_567])
        curl("-C", "-", "-o", part, url)
        assert part.read_bytes() == FILES["large.bin"]

    def test_compressed(self, server):
        plain = FILES["packed/index.html"]
        assert curl("--compressed", f"{server.url}/packed/") == plain
        assert curl("-H", "Accept-Encoding: gzip", f"{server.url}/packed/") == FILES["packed/index.html.gz"]
        assert curl("-H", "Accept-Encoding: br", "--compressed", f"{server.url}/style.css") in (
            FILES["style.css"], FILES["style.css.br"])  # a curl without brotli hands the bytes on

    def test_head(self, server):
        lines = curl("-I", f"{server.url}/large.bin").decode().lower().splitlines()
        assert lines[0].startswith("http/1.1 200")
        assert f"content-length: {len(FILES['large.bin'])}" in lines

    def test_redirect_and_path_as_is(self, server):
        assert curl("-L", f"{server.url}/dir") == FILES["dir/index.html"]
        assert curl("--path-as-is", f"{server.url}/../../etc/passwd") == FILES["404.html"]

    def test_conditions(self, server, tmp_path):
        etag = tmp_path / "etag"
        curl("--etag-save", etag, f"{server.url}/next")
        assert curl("--etag-compare", etag, "-w", "%{http_code}", f"{server.url}/next") == b"304"
        assert curl("-z", LAST_MODIFIED, "-w", "%{http_code}", f"{server.url}/next") == b"304"

    def test_one_connection_for_many_urls(self, server):
        out = curl("-w", "|%{num_connects}|", f"{server.url}/next", f"{server.url}/dir/", f"{server.url}/nowhere")
        assert out.count(b"|1|") == 1
        assert out.count(b"|0|") == 2

    @pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
    def test_an_upload_is_refused_and_curl_sees_why(self, server, tmp_path, expect):
        (tmp_path / "upload").write_bytes(bytes(5 << 20))
        code = curl("-T", tmp_path / "upload", "-H", expect, "-o", "/dev/null", "-w", "%{http_code}", server.url)
        assert code == b"405"

    @pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
    def test_a_get_with_a_body(self, server, tmp_path, expect):
        for size in (10, 50_000, 2_000_000):
            (tmp_path / "body").write_bytes(bytes(size))
            got = curl("-X", "GET", "--data-binary", f"@{tmp_path}/body", "-H", expect, f"{server.url}/next")
            assert got == FILES["next"], size


def test_httpx(mode_server):
    with httpx.Client(base_url=mode_server.url, trust_env=False, follow_redirects=True) as client:
        home = client.get("/dir")
        assert (home.status_code, home.content) == (200, FILES["dir/index.html"])
        assert [step.status_code for step in home.history] == [301]
        page = client.get("/style.css")
        assert page.headers["Content-Encoding"] == "br"
        assert page.content == FILES["style.css"] == brotli.decompress(FILES["style.css.br"])
        assert page.encoding == "utf-8"
        assert client.head("/large.bin").headers["Content-Length"] == str(len(FILES["large.bin"]))
        assert client.post("/large.bin", content=bytes(1_000_000)).status_code == 405
        assert client.get("/next", headers={"If-None-Match": client.get("/next").headers["ETag"]}).status_code == 304


async def one_client(port, number, rounds):
    """Ask for `rounds` files, each connection in an order of its own; raise if a body is not the one asked for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    names = [name for name in FILES if name.startswith("n/")] + ["random.bin", "empty.txt"]
    for name in itertools.islice(itertools.cycle(names), number * 7, number * 7 + rounds):
        writer.write(request("/" + name))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert await reader.readexactly(length) == FILES[name], name
    writer.close()
    await writer.wait_closed()


def test_two_hundred_clients_at_once(mode_server):
    async def all_of_them():
        await asyncio.gather(*(one_client(mode_server.port, number, 20) for number in range(200)))

    asyncio.run(all_of_them())
    mode_server.check()
