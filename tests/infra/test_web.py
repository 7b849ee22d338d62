"""Reading from the web: labels and weights go where the settings allow, whole or again."""

import errno
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from infra import buckets, retries, storage, web
from infra.addresses import shown
from infra.errors import Unavailable, UserError
from tasks.evaluation.geoprior import read_photographs
from tasks.evaluation.label_tables import read_labels
from tasks.model.features import read_weights
from tasks.model.weights import load_foreign
from tasks.params import EvaluateParams
from tasks.patches.places import read_classes
from tasks.patches.scenes import explain

GOOD = b"lon,lat,elevation\n" + b"".join(b"%d,%d,%d\n" % (i, i, i) for i in range(60))


@contextmanager
def serving(answer, host="127.0.0.1"):
    """A server whose GETs are answered by status, headers and body, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, headers, body = answer(self.path, len(asked))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer((host, 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def redirect(target):
    return lambda path, count: (302, {"Location": target + path}, b"")


def labels(url):
    return read_labels(EvaluateParams(labels=(url,)))[0]


@pytest.mark.parametrize("allowed", [[], ["127.0.0.1"]])
def test_a_redirect_is_followed_where_it_may_lead(monkeypatch, allowed):
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", json.dumps(allowed))
    with serving(lambda *_: (200, {}, GOOD)) as (there, asked), serving(redirect(there)) as (here, _):
        assert len(labels(f"{here}/x.csv?sig=1").labels) == 60
        assert asked


@pytest.mark.parametrize("read", [labels, lambda url: load_foreign(url, "weights"), storage.exists])
def test_a_redirect_to_a_host_that_is_not_allowed_is_refused_and_not_asked(monkeypatch, read):
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["localhost"]')
    with serving(lambda *_: (200, {}, GOOD)) as (there, asked), serving(redirect(there)) as (here, first):
        with pytest.raises(UserError, match=r"127\.0\.0\.1 may not be asked.*RANGEGRID_ASSET_HOSTS"):
            read(f"{here.replace('127.0.0.1', 'localhost')}/x.csv")
        assert first
        assert not asked


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest", "file:///etc/passwd", "http://2852039166/"])
def test_no_redirect_leads_to_this_machine_s_secrets(target):
    with serving(redirect(target)) as (here, _), pytest.raises(UserError):
        storage.read(f"{here}/x")


def test_redirects_in_a_circle_end():
    with serving(lambda path, _: (302, {"Location": path}, b"")) as (here, asked):
        with pytest.raises(UserError, match="redirects without end"):
            storage.read(f"{here}/x?sig=secret")
        assert len(asked) == 10


def test_an_answer_that_is_not_whole_is_asked_for_again(tmp_path):
    def cut(path, count):
        return (200, {"Content-Length": str(len(GOOD))}, GOOD if count % 2 == 0 else GOOD[:9])

    with serving(cut) as (here, asked):
        assert storage.read(f"{here}/x") == GOOD
        with storage.as_file(f"{here}/x.csv") as path:
            assert path.read_bytes() == GOOD
        assert len(asked) == 4


@pytest.mark.parametrize(("status", "kind"), [(403, UserError), (503, Unavailable)])
def test_a_signature_is_told_to_nobody(status, kind, monkeypatch):
    monkeypatch.setattr(buckets, "ATTEMPTS", 1)
    with serving(lambda *_: (status, {}, b"")) as (here, _):
        with pytest.raises(kind) as raised:
            labels(f"{here}/x.csv?sig=secret")
        assert "secret" not in str(raised.value).replace("x.csv?sig=secret cannot", "")


READERS = {
    "weights": read_weights,
    "foreign weights": lambda url: load_foreign(url, "weights"),
    "photographs": lambda url: read_photographs(url).__enter__(),
    "classes": read_classes,
    "item": explain,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_signature_is_told_by_no_reader_of_what_is_something_else(reader):
    with serving(lambda *_: (200, {}, GOOD)) as (here, _), pytest.raises(UserError, match=r"/x is no ") as raised:
        READERS[reader](f"{here}/x?sig=secret")
    assert "secret" not in str(raised.value)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_signature_is_not_told_where_a_copy_finds_no_room(monkeypatch):
    monkeypatch.setattr(web, "download", full)
    with pytest.raises(UserError, match=r"no space is left at https://h/x\.csv:"):
        labels("https://user:secret@h/x.csv?sig=secret")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://u:p@h/x?sig=a@b/c#d", "https://h/x"),
        ("https://h?sig=a@b", "https://h"),
        ("s3://key:secret@bucket/a@b?c#d", "s3://bucket/a@b?c#d"),
        ("file:///a@b/c%3F?d", "file:///a@b/c%3F?d"),
        ("a path@with?all", "a path@with?all"),
    ],
)
def test_an_address_is_told_without_what_may_be_secret(url, told):
    assert shown(url) == told


def test_what_is_gone_is_not_there():
    with serving(lambda *_: (404, {}, b"")) as (here, _):
        assert not storage.exists(f"{here}/x")
        with pytest.raises(FileNotFoundError):
            storage.read(f"{here}/x")


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited for, without the waiting."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.mark.parametrize(("told", "least"), [("7", 7), ("100000", 60), ("soon", 0)])
def test_a_server_says_how_long_to_wait(waits, monkeypatch, told, least):
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    busy = 429, {"Retry-After": told}, b""
    with serving(lambda _, count: busy if count == 1 else (200, {}, GOOD)) as (here, asked):
        assert storage.read(f"{here}/x") == GOOD
        assert len(asked) == 2
    assert len(waits) == 1
    assert least <= waits[0] <= least + 1


def test_waits_double_and_differ_by_chance(waits):
    with serving(lambda *_: (503, {}, b"")) as (here, asked):
        for _ in range(20):
            with pytest.raises(Unavailable, match=r"HTTP 503"):
                storage.read(f"{here}/x")
        assert len(asked) == 20 * buckets.ATTEMPTS
    first, second = waits[::2], waits[1::2]
    assert all(0.25 <= wait <= 0.75 for wait in first)
    assert all(0.5 <= wait <= 1.5 for wait in second)
    assert len(set(waits)) > 20


def test_a_wait_can_be_interrupted(monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with serving(lambda *_: (503, {}, b"")) as (here, asked):
        with pytest.raises(KeyboardInterrupt):
            storage.read(f"{here}/x")
        assert len(asked) == 1


def test_a_redirect_within_a_host_is_followed(monkeypatch):
    """As with catalogs and assets: whoever may be asked may send us to another of its own addresses."""
    monkeypatch.setenv("RANGEGRID_ASSET_HOSTS", '["archive.example"]')
    with serving(lambda path, _: (200, {}, GOOD) if path == "/b" else (302, {"Location": "/b"}, b"")) as (here, asked):
        assert storage.read(f"{here}/a") == GOOD
        assert asked == ["/a", "/b"]
