"""Objects by URL: the same tests on local disk and on a real S3 server."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from infra import storage
from infra.errors import Unavailable, UserError, may_pass
from tests.proxy import Proxy, dropped, lost, status, truncated, wrong_length

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "s3"])
def root(request, tmp_path):
    """A fresh root URL on either store."""
    if request.param == "file":
        return (tmp_path / "a space").as_uri()
    box = request.getfixturevalue("sandbox")
    return f"{box.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}"


def raw(url):
    """The same object read by another library."""
    options = {}
    if url.startswith("s3:"):
        options = {"endpoint_url": os.environ["RANGEGRID_S3_ENDPOINT"], "use_listings_cache": False}
    with fsspec.open(url.replace("%20", " "), **options) as file:
        return file.read()


def test_written_objects_are_what_another_library_reads(root):
    url = storage.join(root, "deep", "er", "x.bin")
    storage.write(url, b"one")
    storage.write(url, b"two")
    assert storage.read(url) == b"two" == raw(url)
    assert storage.exists(url)
    assert not storage.exists(url + "y")
    assert storage.names(root) == ["deep"]
    assert storage.names(storage.join(root, "deep/er")) == ["x.bin"]
    assert storage.size(root) == 3


def test_an_empty_object_is_one(root):
    storage.write(storage.join(root, "empty"), b"")
    assert storage.read(storage.join(root, "empty")) == b""
    assert storage.exists(storage.join(root, "empty"))


FAULTS = [truncated(), wrong_length(-2), wrong_length(2), dropped(), status(503), status(429)]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_object_comes_whole_or_again(sandbox, tmp_path, monkeypatch, fault):
    url = f"{sandbox.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}/403"
    with Proxy(sandbox.endpoint) as proxy:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        storage.write(url, b"all of it")
        proxy.inject(fault, times=2)
        assert storage.read(url) == b"all of it"
        assert proxy.faults.total() == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_zarr_reads_and_writes_whole_or_again(sandbox, tmp_path, monkeypatch, fault):
    url = f"{sandbox.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}/x.zarr"
    values = np.arange(64.0).reshape(8, 8)
    with Proxy(sandbox.endpoint) as proxy:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        for method in "PUT", "GET":
            proxy.inject(fault, when=lambda request, method=method: request.method == method, times=2)
        array = zarr.create_array(storage.zarr_store(url), shape=(8, 8), shards=(8, 8), chunks=(4, 4), dtype="f8")
        array[:] = values
        assert (zarr.open_array(storage.zarr_store(url), mode="r")[:] == values).all()
        assert proxy.faults.total() == 4


def test_zarr_tells_which_object_cannot_be_had(sandbox, tmp_path, monkeypatch):
    url = f"{sandbox.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}/x.zarr"
    zarr.create_array(storage.zarr_store(url), shape=(1,), dtype="f8")
    with Proxy(sandbox.endpoint) as proxy:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        proxy.inject(truncated())
        with pytest.raises(Unavailable, match=re.escape(f"did not serve {url}/")):
            zarr.open_array(storage.zarr_store(url), mode="r")


def test_reading_nothing_is_file_not_found_and_leaves_no_trace(root):
    with pytest.raises(FileNotFoundError):
        storage.read(storage.join(root, "none/x"))
    assert storage.names(storage.join(root, "none")) == []
    assert storage.names(root) == []


def test_below_a_file_is_nothing(root):
    storage.write(f"{root}/file", b"x")
    assert not storage.exists(f"{root}/file/card.json")
    with pytest.raises(FileNotFoundError):
        storage.read(f"{root}/file/card.json")


def test_of_many_creators_one_wins(root):
    url, wins = storage.join(root, "once"), []
    threads = [threading.Thread(target=lambda i=i: wins.append((storage.create(url, b"%d" % i), i))) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    winner = [i for won, i in wins if won]
    assert len(winner) == 1
    assert storage.read(url) == b"%d" % winner[0]


def test_delete_takes_the_tree_and_only_it(root):
    for name in ("a/1", "a/b/2", "ab"):
        storage.write(storage.join(root, name), b"x")
    storage.delete(storage.join(root, "a"))
    assert not storage.exists(storage.join(root, "a/1"))
    assert storage.names(storage.join(root, "a")) in ([], ["b"])  # SeaweedFS drops empty directories later
    assert storage.names(storage.join(root, "a/b")) == []  # and lists them in themselves till then
    assert storage.paths(root) == ["ab"]
    assert storage.size(root) == 1


def test_a_missing_bucket_is_one_sentence(sandbox):
    with pytest.raises(UserError, match=r"bucket of s3://no-such-bucket-here.* does not exist") as caught:
        storage.check_writable("s3://no-such-bucket-here/x")
    assert not may_pass(caught.value)


def test_a_wrong_key_is_one_sentence(sandbox, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"forbidden: check AWS_ACCESS_KEY_ID") as caught:
        storage.check_writable(sandbox.environment()["RANGEGRID_STORAGE_URL"])
    assert not may_pass(caught.value)


FULL_DISK = """
mount -t tmpfs -o size=64k none "$1" && exec "$2" -c "
import sys
from infra import storage
from infra.errors import Unavailable, UserError
try:
    storage.write(sys.argv[1], bytes(1 << 20))
except UserError as error:
    print(error)
" "file://$1/x"
"""


def test_a_full_disk_is_one_sentence(tmp_path, mounting):
    command = [*mounting, "sh", "-c", FULL_DISK, "sh", str(tmp_path), sys.executable]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "no space is left at" in ran.stdout, ran.stderr


def test_too_small_a_disk_is_refused_before_it_is_full(tmp_path):
    with pytest.raises(UserError, match=r"GB free and the run stores 1,000,000,000.0 GB: free some, or set RANGEGRID_"):
        storage.check_writable(tmp_path.as_uri(), 10**18)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="use file:///directory or s3://bucket/prefix"):
        storage.write("gs://bucket/x", b"")


def test_an_unwritable_directory_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError):
        storage.check_writable((tmp_path / "file" / "under").as_uri())


def test_a_replacement_needs_the_version_that_it_replaces(root):
    url = storage.join(root, "pointer")
    assert storage.replace(url, b"one", None)
    assert not storage.replace(url, b"other", None)
    data, tag = storage.read_tagged(url)
    assert data == b"one" == raw(url)
    assert storage.replace(url, b"two", tag)
    assert not storage.replace(url, b"three", tag)
    assert not storage.replace(storage.join(root, "none"), b"x", tag)
    assert not storage.exists(storage.join(root, "none"))
    assert storage.read(url) == b"two"


def test_an_empty_object_can_be_replaced(root):
    url = storage.join(root, "empty")
    storage.write(url, b"")
    assert storage.replace(url, b"full", storage.read_tagged(url)[1])
    assert storage.read(url) == b"full"


def test_of_many_replacements_of_one_version_one_wins(root):
    url, wins = storage.join(root, "contended"), []
    storage.write(url, b"0")
    tag = storage.read_tagged(url)[1]
    threads = [
        threading.Thread(target=lambda i=i: wins.append((storage.replace(url, b"%d" % i, tag), i))) for i in range(1, 9)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    (winner,) = [i for won, i in wins if won]
    assert storage.read(url) == b"%d" % winner


COUNT_UP = """
import sys
from infra import storage
for _ in range(20):
    while True:
        data, tag = storage.read_tagged(sys.argv[1])
        if storage.replace(sys.argv[1], data + sys.argv[2].encode(), tag):
            break
"""


def test_processes_lose_no_update(tmp_path):
    url = storage.join(tmp_path.as_uri(), "counter")
    storage.write(url, b"-")
    started = [subprocess.Popen([sys.executable, "-c", COUNT_UP, url, name], cwd=ROOT) for name in "ab"]
    assert [process.wait(120) for process in started] == [0, 0]
    assert sorted(storage.read(url).decode()) == sorted("-" + 20 * "ab")


@pytest.mark.parametrize("create", [True, False])
def test_a_lost_answer_is_recognised_as_ours(sandbox, tmp_path, monkeypatch, create):
    url = f"{sandbox.environment()['RANGEGRID_STORAGE_URL']}/{tmp_path.name}/pointer"
    with Proxy(sandbox.endpoint) as proxy:
        monkeypatch.setenv("RANGEGRID_S3_ENDPOINT", proxy.url)
        if not create:
            storage.write(url, b"old")
        tag = None if create else storage.read_tagged(url)[1]
        proxy.inject(lost(), lambda r: r.method == "PUT", times=1)
        assert storage.replace(url, b"ours", tag)
        assert proxy.faults["lost"] == 1
        assert not storage.replace(url, b"other", tag)
        assert storage.read(url) == b"ours"


HOLD = """
import sys, time
from pathlib import Path
from infra import storage
with storage._locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path):
    path = tmp_path / "pointer"
    storage.write(path.as_uri(), b"old")
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        done = []
        waiting = threading.Thread(
            target=lambda: done.append(storage.replace(path.as_uri(), b"new", storage.read_tagged(path.as_uri())[1]))
        )
        waiting.start()
        waiting.join(0.3)
        assert not done
        holder.kill()
        waiting.join(60)
    assert done == [True]
    assert storage.read(path.as_uri()) == b"new"


OFF_UNIX = """
import sys
sys.modules["fcntl"] = None
from infra import storage
storage.write(sys.argv[1], b"x")
print(storage.read(sys.argv[1]))
"""


def test_it_is_imported_where_there_is_no_fcntl(tmp_path):
    command = [sys.executable, "-c", OFF_UNIX, (tmp_path / "x").as_uri()]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout == "b'x'\n"
