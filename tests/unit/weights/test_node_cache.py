"""Weights are read from a shared store once for all processes of a machine, and verified."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.weights.test_weight_store import expected, publish
from tlt_sglang.weights.manifest import BadVersion
from tlt_sglang.weights.node_cache import KEEP, NodeCache
from tlt_sglang.weights.store import WEIGHTS, Store

READERS = 4
READ = """
import sys
from pathlib import Path
from tlt_sglang.weights.node_cache import NodeCache
sys.stdout.buffer.write(NodeCache(Path(sys.argv[1])).read(sys.argv[2], Path(sys.argv[3])))
"""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache" / "versions")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def test_the_origin_is_read_once(cache: NodeCache, origin: Path) -> None:
    sha256 = digest(b"weights")
    assert cache.read(sha256, origin) == b"weights"
    origin.unlink()
    assert cache.read(sha256, origin) == b"weights"
    for folder in (cache.folder, cache.folder.parent):
        assert (folder.stat().st_mode & 0o777) == 0o700


def test_processes_at_once_read_the_origin_once(cache: NodeCache, tmp_path: Path) -> None:
    """The origin is a pipe: whoever reads it after the first one would wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", READ, str(cache.folder), digest(b"weights"), str(pipe)]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(READERS)]
    pipe.write_bytes(b"weights")
    assert [reader.communicate(timeout=20)[0] for reader in readers] == [b"weights"] * READERS


def test_a_reader_that_is_killed_holds_nobody_up(cache: NodeCache, tmp_path: Path) -> None:
    pipe, sha256 = tmp_path / "pipe", digest(b"weights")
    os.mkfifo(pipe)
    command = [sys.executable, "-c", READ, str(cache.folder), sha256, str(pipe)]
    reader = subprocess.Popen(command)
    while not (cache.folder / "lock").exists():
        time.sleep(0.01)
    reader.kill()
    reader.wait()
    origin = tmp_path / "weights"
    origin.write_bytes(b"weights")
    assert cache.read(sha256, origin) == b"weights"


def test_what_is_damaged_is_read_again(cache: NodeCache, origin: Path) -> None:
    sha256 = digest(b"weights")
    cache.read(sha256, origin)
    (kept,) = cache.folder.glob("*.safetensors")
    kept.write_bytes(b"weighty")
    assert cache.read(sha256, origin) == b"weights"
    assert kept.read_bytes() == b"weights"


def test_a_damaged_origin_is_not_kept(cache: NodeCache, origin: Path) -> None:
    assert cache.read(digest(b"others"), origin) == b"weights"
    assert not list(cache.folder.glob("*.safetensors"))


def test_the_last_ones_are_kept(cache: NodeCache, origin: Path) -> None:
    for number in range(KEEP + 2):
        data = b"%d" % number
        origin.write_bytes(data)
        cache.read(digest(data), origin)
        os.utime(cache.folder / f"{digest(data)}.safetensors", (number, number))
    last = {f"{digest(b'%d' % n)}.safetensors" for n in range(2, KEEP + 2)}
    assert {path.name for path in cache.folder.glob("*.safetensors")} == last


def test_a_folder_that_cannot_be_used_is_told(
    tmp_path: Path, origin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = NodeCache(tmp_path / "file" / "versions")
    assert cache.read(digest(b"weights"), origin) == b"weights"
    assert "cannot be used" in caplog.text


def test_a_folder_that_others_may_enter_is_not_used(
    cache: NodeCache, origin: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(0o755)
    assert cache.read(digest(b"weights"), origin) == b"weights"
    assert "open to others" in caplog.text and [*cache.folder.iterdir()] == []


def test_a_store_with_a_cache(tmp_path: Path) -> None:
    """Only machines that have not read a version see that it is damaged."""
    store = Store(tmp_path / "store", cache=tmp_path / "one")
    version = publish(store)
    loaded = store.load(version, expected())
    weights = store.path(version) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    again = store.load(version, expected())
    assert all(tensor.equal(again[name]) for name, tensor in loaded.items())
    with pytest.raises(BadVersion):
        Store(tmp_path / "store", cache=tmp_path / "other").load(version, expected())
