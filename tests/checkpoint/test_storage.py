"""How a file is read by position, and from far away with few requests."""

import multiprocessing
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from upath import UPath

from lightning_zero.checkpoint import storage
from lightning_zero.checkpoint.storage import locate, open_file
from lightning_zero.errors import IncompleteCheckpointError

PART = storage._PART_BYTES
CONTENT = random.Random(0).randbytes(5 * PART + 12345)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("stored") / "file"
    path.write_bytes(CONTENT)
    return path


class Server(ThreadingHTTPServer):
    """Serves `CONTENT`, by ranges; none is answered before as many have come as `met` says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[tuple[int, int]] = []
        self.met = threading.Barrier(1)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/file"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self) -> None:
        begin, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.server.ranges.append((begin, end + 1))
        self.server.met.wait(30)
        content = CONTENT[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(content) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def read(location: Path | str, offset: int, nbytes: int) -> bytes:
    target = bytearray(nbytes)
    open_file(locate(location)).read_into(offset, memoryview(target))
    return bytes(target)


RANGES = [(0, len(CONTENT)), (1, PART), (PART - 1, PART + 1), (7, 3 * PART + 5), (len(CONTENT) - 9, 9), (5, 0)]


@pytest.mark.parametrize(("offset", "nbytes"), RANGES)
def test_any_range_is_read_wherever_the_file_lies(path: Path, server: Server, offset: int, nbytes: int):
    for location in (path, server.url):
        assert read(location, offset, nbytes) == CONTENT[offset : offset + nbytes]


def test_what_is_large_and_far_away_comes_by_several_requests_at_once_and_no_byte_twice(server: Server):
    server.met = threading.Barrier(3)
    assert read(server.url, 5, 3 * PART) == CONTENT[5 : 5 + 3 * PART]
    assert sorted(server.ranges) == [(5 + PART * part, 5 + PART * (part + 1)) for part in range(3)]


def test_small_ones_come_with_their_neighbours_in_whatever_order_they_are_read(server: Server):
    file = open_file(locate(server.url))
    offsets = list(range(0, 3 * PART - 1000, 1000))
    random.Random(1).shuffle(offsets)
    for offset in offsets[:500]:
        target = bytearray(1000)
        file.read_into(offset, memoryview(target))
        assert target == CONTENT[offset : offset + 1000]
    assert max(Counter(server.ranges).values()) == 1
    assert len(server.ranges) == 3 * PART >> 20  # a request for each MiB


def test_a_file_that_was_cut_short_is_an_error_whichever_thread_finds_it(path: Path, server: Server):
    for location in (path, server.url):
        with pytest.raises(IncompleteCheckpointError, match="cut short"):
            read(location, PART, len(CONTENT))


def _read_whole(url: str) -> None:
    assert read(url, 0, len(CONTENT)) == CONTENT


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
def test_a_forked_process_makes_requests_of_its_own(server: Server):
    _read_whole(server.url)  # there are threads now, which a fork doesn't take along
    child = multiprocessing.get_context("fork").Process(target=_read_whole, args=(server.url,))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_url_that_has_become_a_path_is_refused_with_the_string_that_was_meant():
    with pytest.raises(ValueError, match="'s3://bucket/run'"):
        locate(Path("s3://bucket/run"))
    assert locate("C:/run") == Path("C:/run")
    assert locate("./a:/b") == Path("./a:/b")


def test_what_a_url_was_made_with_goes_with_it():
    url = locate(UPath("http://127.0.0.1/ckpts", client_kwargs={"trust_env": True}) / "tag")
    assert url.storage_options["client_kwargs"] == {"trust_env": True}
    assert (url / "file").fs != locate("http://127.0.0.1/ckpts").fs
    assert locate(url).fs is url.fs


def test_a_tilde_is_the_home_as_in_lightnings_own_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("~/run", Path("~/run"), "file://~/run"):
        assert locate(path) == tmp_path / "run"
    assert locate("./~/run") == Path("~/run")
