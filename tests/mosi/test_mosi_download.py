"""The download against a server on this machine that stalls, truncates and lies."""

import pickle
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from examples.mosi import download


def example():
    """Of arrays of its own: one array under several references is refused."""
    words = ["a", "film"]
    return (
        (words, np.ones((2, 47), np.float32), np.ones((2, 74), np.float32)),
        np.ones((1, 1)),
        "video[0]",
    )


CONTENT = pickle.dumps({part: [example()] for part in ("train", "dev", "test")})


@pytest.fixture
def server():
    """Answers each request by `server.answer(handler, first byte)`; keeps what was asked for in `server.ranges`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ranges = self.headers.get("Range")
            server.ranges.append(ranges)
            server.answer(self, int(ranges[6:-1]) if ranges else 0)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.ranges, server.answer = True, [], whole
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/mosi.pkl"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def respond(
    handler, status=200, length=None, kind="application/octet-stream", body=CONTENT, extra=()
):
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in extra:
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler, start):
    """A server that can go on from any byte."""
    if start >= len(CONTENT):
        respond(handler, 416, body=b"")
    elif start:
        place = f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
        respond(handler, 206, body=CONTENT[start:], extra=[("Content-Range", place)])
    else:
        respond(handler)


def truncated(handler, start):
    respond(handler, length=len(CONTENT), body=CONTENT[:300])


def parts(folder):
    return [path.stat().st_size for path in folder.glob(".*.part")]


def test_a_whole_file_is_checked_and_named(server, tmp_path):
    download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert (tmp_path / "mosi.pkl").read_bytes() == CONTENT
    assert not parts(tmp_path)


def test_a_truncated_file_is_kept_and_resumed(server, tmp_path):
    server.answer = truncated
    with pytest.raises(ValueError, match=f"the connection ended after 300 of {len(CONTENT)} bytes"):
        download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert parts(tmp_path) == [300]
    server.answer = whole
    download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert server.ranges == [None, "bytes=300-"]
    assert (tmp_path / "mosi.pkl").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_starts_anew(server, tmp_path):
    server.answer = truncated
    with pytest.raises(ValueError, match="the connection ended"):
        download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    server.answer = lambda handler, start: respond(handler)
    download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert (tmp_path / "mosi.pkl").read_bytes() == CONTENT


def test_a_stalling_server_is_given_up_and_resumed(server, tmp_path):
    def stalls(handler, start):
        respond(handler, length=len(CONTENT), body=CONTENT[:300])
        handler.wfile.flush()
        server.released.wait(10)

    server.answer = stalls
    with pytest.raises(TimeoutError, match=r"no byte for 0\.3 seconds"):
        download.fetch(server.url, tmp_path / "mosi.pkl", timeout=0.3)
    assert parts(tmp_path) == [300]
    server.answer = whole
    download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert (tmp_path / "mosi.pkl").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda handler, start: respond(handler, length=300),
            "not the data: .* must be a whole pickle",
        ),
        (
            lambda handler, start: respond(handler, length=1 << 50),
            "announced, more than any of these files has",
        ),
        (
            lambda handler, start: respond(handler, length=len(CONTENT) + 5),
            "the connection ended after",
        ),
        (
            lambda handler, start: respond(handler, body=b"<html>", kind="text/html"),
            "a web page in place of a file",
        ),
        (
            lambda handler, start: respond(handler, body=pickle.dumps([1])),
            "not the data: .* must be a dict",
        ),
        (lambda handler, start: respond(handler, 206), "bytes from another place than asked for"),
    ],
)
def test_a_lie_is_found_out(server, tmp_path, answer, message):
    server.answer = answer
    with pytest.raises(ValueError, match=message):
        download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert not (tmp_path / "mosi.pkl").exists()


def test_what_is_not_the_data_is_not_resumed(server, tmp_path):
    server.answer = lambda handler, start: respond(handler, length=300)
    with pytest.raises(ValueError, match="not the data"):
        download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert not parts(tmp_path)


def test_a_part_that_is_whole_needs_no_more_bytes(server, tmp_path):
    part = tmp_path / f".mosi.pkl.{download.fingerprint(server.url.encode())}.part"
    part.write_bytes(CONTENT)
    download.fetch(server.url, tmp_path / "mosi.pkl", timeout=5)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "mosi.pkl").read_bytes() == CONTENT


@pytest.fixture
def command(monkeypatch, tmp_path):
    def command(*flags):
        monkeypatch.setattr(
            sys, "argv", ["download", "--folder", str(tmp_path), "--timeout", "1", *flags]
        )
        return download.main()

    return command


def test_a_dead_link_is_explained(server, command, capsys):
    server.answer = lambda handler, start: respond(handler, 404, body=b"")
    assert command("--url", server.url) == 1
    told = capsys.readouterr().err
    assert server.url in told
    assert "HTTP Error 404" in told
    assert "give it with --url, or copy the\nfile from elsewhere to" in told


def test_the_next_link_is_tried_after_a_dead_one(server, command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(download, "LINKS", {"mosi.pkl": ("http://127.0.0.1:9/dead", server.url)})
    assert command() == 0
    assert "Train on it" in capsys.readouterr().out
    assert command() == 0
    assert "is there already: mosi.pkl, the format of MAG-BERT" in capsys.readouterr().out
