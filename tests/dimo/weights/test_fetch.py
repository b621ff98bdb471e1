"""Fetching from real servers on this machine: resumed, checked, whole or not at all."""

import hashlib
import re
import resource
import signal
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dimo.errors import DimoError
from dimo.weights import download as fetching
from dimo.weights.catalog import OFFICIAL, OfficialFile, default_folder, locate
from dimo.weights.download import fetch, recorded_sha256

DATA = bytes(range(256)) * 20_000  # 5 MB: several blocks
SHA256 = hashlib.sha256(DATA).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()
YAML = b"model: {}\n"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`, with ranges; breaks off after the numbers in `server.cuts`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        world = self.server.world
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start else None
        world.log.append((self.command, self.path, start, self.headers.get("Authorization")))
        if world.refuse:
            return self.reply(world.refuse.pop(0), {}, b"")
        found = re.fullmatch(r"/(\w+/\w+)/resolve/(main|c0ffee)/(.+)", self.path)
        if found:
            return self.hub(found[3], body)
        content = world.content.get(self.path.removeprefix("/cdn"))
        if content is None:
            return self.reply(404, {}, b"")
        if start is None or not world.ranges:
            return self.reply(200, {}, content, body)
        if start >= len(content):
            return self.reply(416, {}, b"")
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.reply(206, {"Content-Range": span}, content[start:], body)

    def hub(self, path, body):
        """As Hugging Face: large files lie elsewhere, small ones in git."""
        content = self.server.world.content.get(f"/{path}")
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
        commit = {"X-Repo-Commit": "c0ffee"}
        if len(content) < 1000:
            return self.reply(200, {**commit, "ETag": f'"{"a" * 40}"'}, content, body)
        large = {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.server.server_port}/cdn/{path}",
        }
        return self.reply(302, {**commit, **large}, b"")

    def reply(self, status, headers, content, body=True):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        cuts = self.server.world.cuts
        if content and cuts:
            self.wfile.write(content[: cuts.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that went away is what these tests are about."""


class World:
    """A server, what it has, and what it was asked."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.content = {"/files/net.pth": DATA}
        self.ranges, self.cuts, self.refuse, self.log = True, [], [], []

    @property
    def starts(self):
        return [start for command, path, start, _ in self.log if command == "GET"]


@contextmanager
def serving():
    with Server(("127.0.0.1", 0), Handler) as server:
        server.world = World(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.world
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setattr(fetching, "_PAUSE", 0.0)
    with serving() as world:
        yield world


@pytest.fixture
def publish(monkeypatch, world):
    """Adds a row to the table of official files."""

    def add(name="net", source=None, path="net.pth", **known):
        source = source or f"{world.url}/files"
        known = {"licence": "MIT", "size": None, "contents": "a network", **known}
        monkeypatch.setitem(OFFICIAL, name, OfficialFile(source, path, **known))

    return add


@pytest.fixture
def hub(monkeypatch, world):
    monkeypatch.setenv("HF_ENDPOINT", world.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    world.content = {"/sub/last.ckpt": DATA, "/sub/model.yaml": YAML}


def quiet(*_):
    pass


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_arrives_whole_with_its_hash_recorded(publish, tmp_path):
    publish(sha256=SHA256)
    seen = []
    paths = fetch("net", tmp_path / "new", lambda *progress: seen.append(progress))
    assert paths == [tmp_path / "new" / "net.pth"] == [locate("net", tmp_path / "new")]
    assert paths[0].read_bytes() == DATA
    assert recorded_sha256(paths[0]) == SHA256
    assert names(tmp_path) == ["net.pth", "net.pth.sha256"]
    assert seen[-1] == ("net", len(DATA), len(DATA))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_lost_connections_are_resumed_at_the_byte(publish, world, tmp_path):
    publish(sha256=SHA256)
    world.cuts = [1_000_000, 1, 2_000_001]
    assert fetch("net", tmp_path, quiet)[0].read_bytes() == DATA
    assert world.starts == [None, 1_000_000, 1_000_001, 3_000_002]


def test_an_interrupted_fetch_continues_in_the_next_command(publish, world, tmp_path):
    publish(sha256=SHA256)

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("net", tmp_path, interrupt)
    assert names(tmp_path) == [f"net.pth.{SHA256[:8]}.part"]
    assert fetch("net", tmp_path, quiet)[0].read_bytes() == DATA
    assert world.starts == [None, 1 << 20]
    assert names(tmp_path) == ["net.pth", "net.pth.sha256"]


def test_a_server_without_ranges_sends_all_again(publish, world, tmp_path):
    publish()
    world.ranges, world.cuts = False, [3_000_000]
    assert fetch("net", tmp_path, quiet)[0].read_bytes() == DATA
    assert recorded_sha256(tmp_path / "net.pth") == SHA256


def test_a_part_longer_than_the_file_is_begun_anew(publish, world, tmp_path):
    publish()
    (tmp_path / "net.pth.part").write_bytes(DATA + b"more")
    assert fetch("net", tmp_path, quiet)[0].read_bytes() == DATA


def test_a_busy_server_is_asked_again(publish, world, tmp_path):
    publish()
    world.refuse = [503, 429]
    assert fetch("net", tmp_path, quiet)[0].read_bytes() == DATA


def test_a_present_file_is_left_as_it_is(publish, world, tmp_path):
    publish(sha256=SHA256)
    (tmp_path / "net.safetensors").write_bytes(b"converted")
    assert fetch("net", tmp_path, quiet) == [tmp_path / "net.safetensors"]
    assert not world.log


def refused(name, folder, *words):
    with pytest.raises(DimoError) as caught:
        fetch(name, folder, quiet)
    message = str(caught.value)
    assert "\n" not in message
    for part in words:
        assert part in message
    return message


def test_a_wrong_checksum_leaves_nothing(publish, tmp_path):
    publish(sha256=OTHER)
    refused("net", tmp_path, SHA256, OTHER, "was removed", "by hand", str(tmp_path / "net.pth"))
    assert not names(tmp_path)


def test_a_missing_file_leaves_nothing(publish, tmp_path):
    publish(path="gone.pth")
    refused("net", tmp_path, "404", "by hand", str(tmp_path / "gone.pth"))
    assert not names(tmp_path)


@pytest.mark.parametrize("cuts", [[], [2_000_000]])
def test_a_server_that_goes_away_is_named_and_what_came_is_kept(publish, world, tmp_path, cuts):
    publish()
    world.cuts = [*cuts, *[0] * 9]
    message = refused("net", tmp_path, "cannot fetch", f"{world.url}/files/net.pth", "by hand")
    assert ("2,000,000 bytes are kept" in message) == bool(cuts)
    assert names(tmp_path) == (["net.pth.part"] if cuts else [])


@pytest.mark.parametrize("source", ["http://127.0.0.1:1/x", "http://no.such.host.invalid/x"])
def test_no_connection_names_the_next_step(publish, tmp_path, source):
    publish(source=source)
    refused("net", tmp_path, "cannot fetch", "check the connection", f"download {source}/net.pth")
    assert not names(tmp_path)


def test_an_unknown_name_and_a_folder_that_cannot_be_written_are_named(publish, tmp_path):
    publish()
    refused("nett", tmp_path, "did you mean 'net'")
    (tmp_path / "file").write_bytes(b"")
    refused("net", tmp_path / "file", "cannot write", "--folder")


def test_a_full_disk_is_named_and_what_came_is_kept(publish, world, tmp_path, monkeypatch):
    publish()
    monkeypatch.setattr(fetching, "_BLOCK", 1 << 16)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        refused("net", tmp_path, "cannot write", "free space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == ["net.pth.part"]


def test_two_fetches_do_not_write_one_file(publish, tmp_path):
    publish()

    def second(*_):
        refused("net", tmp_path, "another dimo weights fetch")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("net", tmp_path, second)


def test_hugging_face_is_asked_for_commit_and_checksum(hub, publish, world, tmp_path):
    publish("config", "some/repo", "sub/model.yaml")
    publish("net", "some/repo", "sub/last.ckpt", companion="config")
    world.cuts = [len(YAML), 1_000_000]
    paths = fetch("net", tmp_path, quiet)
    assert paths == [tmp_path / "sub" / "model.yaml", tmp_path / "sub" / "last.ckpt"]
    assert [path.read_bytes() for path in paths] == [YAML, DATA]
    assert recorded_sha256(paths[1]) == SHA256
    asked = [(path, start) for command, path, start, _ in world.log if command == "GET"]
    assert ("/some/repo/resolve/c0ffee/sub/last.ckpt", 1_000_000) in asked
    assert ("/cdn/sub/last.ckpt", 1_000_000) in asked
    # the token is for the hub alone, not for the storage it redirects to
    assert {key for _, path, _, key in world.log if path.startswith("/cdn")} == {None}
    assert {key for _, path, _, key in world.log if "resolve" in path} == {"Bearer hf_secret"}


def test_a_file_that_hugging_face_changed_is_refused(hub, publish, tmp_path):
    publish("net", "some/repo", "sub/last.ckpt", sha256=OTHER)
    refused("net", tmp_path, SHA256, OTHER, "its owner changed it")
    assert not names(tmp_path)


def test_hugging_face_without_the_file_or_out_of_reach(hub, publish, monkeypatch, tmp_path):
    publish("net", "some/repo", "sub/gone.ckpt")
    refused("net", tmp_path, "sub/gone.ckpt of some/repo", "404", "by hand")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refused("net", tmp_path, "cannot reach sub/gone.ckpt", "check the connection")
    assert not names(tmp_path)


def test_the_default_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("DIMO_WEIGHTS", str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv("DIMO_WEIGHTS")
    assert default_folder().parts[-3:] == (".cache", "dimo", "weights")
