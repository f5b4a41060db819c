"""A real documentation site: every file of it, plain and compressed, compared with the tree it was packed from."""

import gzip
from urllib.parse import quote

import brotli
import docset
import pytest
from support import Server, request

CONNECTIONS = 4
AHEAD = 16  # requests in flight on each connection


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    server = Server(docset.build(), "--dotfiles", log=tmp_path_factory.mktemp("docs") / "stderr")
    yield server
    server.check()
    server.stop()


def fetch_all(server, names, **headers):
    """Yield (name, response) for all of them, over a few keep-alive connections with some requests in flight."""
    for share in range(CONNECTIONS):
        mine = names[share::CONNECTIONS]
        with server.connect() as client:
            for begin in range(0, len(mine), AHEAD):
                batch = mine[begin:begin + AHEAD]
                client.send(b"".join(request("/" + quote(name), **headers) for name in batch))
                for name in batch:
                    yield name, client.response()


def smallest(path, codings):
    """The size of the smallest representation among the plain file and its siblings of these endings."""
    siblings = [path.with_name(path.name + ending) for ending in codings]
    return min(file.stat().st_size for file in [path, *siblings] if file.is_file())


def test_every_file_is_served_byte_for_byte(docs):
    files = docset.served_files()
    assert len(files) > 1000
    for name, response in fetch_all(docs, list(files)):
        assert response.status == 200, name
        assert response.body == files[name].read_bytes(), name
        assert response.get("Content-Encoding") is None, name


@pytest.mark.parametrize(("accepted", "endings"), [("gzip", [".gz"]), ("gzip, br", [".gz", ".br"])])
def test_every_compressed_file_decodes_to_the_plain_one(docs, accepted, endings):
    files = docset.served_files()
    decode = {None: bytes, "gzip": gzip.decompress, "br": brotli.decompress}
    seen = dict.fromkeys(decode, 0)
    for name, response in fetch_all(docs, list(files), accept_encoding=accepted):
        coding = response.get("Content-Encoding")
        seen[coding] += 1
        assert response.status == 200, name
        assert decode[coding](response.body) == files[name].read_bytes(), name
        if not files[name].is_symlink():
            assert len(response.body) == smallest(files[name], endings), name
    assert seen["gzip" if len(endings) == 1 else "br"] > 500


def test_every_directory_is_redirected_to_its_slash(docs):
    files = docset.served_files()
    indexed = [name.removesuffix("/index.html") for name in files if name.endswith("/index.html")]
    for name, response in fetch_all(docs, indexed):
        assert response.status == 301, name
        assert response["Location"] == "./" + quote(name.rpartition("/")[2]) + "/"
    for name, response in fetch_all(docs, [name + "/" for name in indexed]):
        assert response.body == files[name + "index.html"].read_bytes(), name
