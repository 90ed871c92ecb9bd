"""Published versions appear whole or not at all, and nothing but what was published is loaded."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support import publisher
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.weights import files, manifest
from tlt_sglang.weights.manifest import BadVersion, Base, Expected, Spec
from tlt_sglang.weights.store import MANIFEST, WEIGHTS, Store

BASE = Base(hidden_size=8, vocab_size=100, draft_vocab_size=50, layers=3, name="a digest")


def weights(seed: int = 0, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(size, 2 * size, generator=generator).bfloat16(),
        "norm.weight": torch.randn(size, generator=generator),
        "ids": torch.arange(4),
    }


def expected(base: Base = BASE, architecture: str = "eagle3", **tensors: Spec) -> Expected:
    specs = {"fc.weight": Spec("F32", (8, 16)), "norm.weight": Spec("F32", (8,))}
    return Expected(architecture, base, specs | {"ids": Spec("I64", (4,))} | tensors)


def publish(store: Store, seed: int = 0, size: int = 8) -> int:
    gate = {"accept_length": 2.5}
    return store.publish(weights(seed, size), "eagle3", BASE, gate=gate, made_by="a test")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def child(run: Callable[[], None]) -> int:
    """The id of a process that does `run`."""
    if pid := os.fork():
        return pid
    try:
        run()
    finally:
        os._exit(1 if sys.exc_info()[0] else 0)


# ---- publishing ----------------------------------------------------------------------------------


def test_what_was_published_is_loaded_in_the_dtypes_of_the_engine(tmp_path: Path) -> None:
    store = Store(tmp_path / "made" / "here")
    assert store.versions() == [] and store.latest() is None
    assert publish(store) == 1
    loaded = store.load(1, expected())
    for name, tensor in weights().items():
        assert loaded[name].dtype == (torch.int64 if name == "ids" else torch.float32)
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name


def test_the_manifest_tells_where_a_version_comes_from(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    assert store.publish(weights(1), "eagle", BASE, parent=1, gate={"won": 0.1}, made_by="me") == 2
    manifest = store.manifest(2)
    assert (manifest.architecture, manifest.base, manifest.parent) == ("eagle", BASE, 1)
    assert (manifest.gate, manifest.made_by, manifest.tensors["ids"]) == (
        {"won": 0.1},
        "me",
        Spec("I64", (4,)),
    )
    data = (tmp_path / "v000002" / WEIGHTS).read_bytes()
    assert (manifest.size, manifest.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_tensors_may_share_memory_and_be_transposed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    one = torch.arange(6.0).view(2, 3)
    store.publish({"one": one, "other": one.t()}, "eagle3", BASE)
    specs = {"one": Spec("F32", (2, 3)), "other": Spec("F32", (3, 2))}
    loaded = store.load(1, Expected("eagle3", BASE, specs))
    assert torch.equal(loaded["one"], one) and torch.equal(loaded["other"], one.t())


def test_only_the_owner_can_read_a_version(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    publish(store)
    for folder in (store.root, store.path(1)):
        assert folder.stat().st_mode & 0o077 == 0


def test_the_newest_are_kept_and_those_that_are_pinned_or_in_use(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    publish(store), publish(store), publish(store)
    assert store.versions() == [2, 3]
    store.pin(2)
    store.use(3)
    for seed in range(4):
        publish(store, seed)
    assert store.versions() == [2, 3, 6, 7]
    store.pin(2, False)
    store.use(3, False)
    publish(store)
    assert store.versions() == [7, 8]
    assert names(tmp_path) == ["v000007", "v000008"]


def test_a_killed_engine_holds_no_version(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    publish(store)
    pid = child(lambda: store.use(1))
    os.waitpid(pid, 0)
    publish(store)
    assert store.versions() == [2]


def test_a_mark_of_another_machine_holds_a_version_while_it_is_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, keep=1)
    publish(store)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(files, "owned", lambda name: f"{name}@1@elsewhere")
        store.use(1)
    publish(store)
    assert store.versions() == [1, 2]
    (mark,) = store.path(1).glob("used@*")
    os.utime(mark, (0, time.time() - files.OLD_SECONDS - 1))
    publish(store)
    assert store.versions() == [3]


def test_a_version_that_is_gone_cannot_be_marked(tmp_path: Path) -> None:
    for mark in (Store(tmp_path).pin, Store(tmp_path).use):
        with pytest.raises(manifest.NoVersion, match=r"version 3 is not used: .* not exist"):
            mark(3)


def test_publishers_at_the_same_time_take_different_numbers(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=20)

    def five() -> None:
        for seed in range(5):
            publish(store, seed)

    pids = [child(five) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert store.versions() == list(range(1, 16))
    for version in store.versions():
        store.load(version, expected())


# ---- failing and dying ---------------------------------------------------------------------------


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["os.fsync", "os.mkdir", "pathlib.Path.rename"])
def test_a_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = Store(tmp_path)
    publish(store)
    before = names(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(where, no_space)
        with pytest.raises(EnvironmentProblem) as error:
            publish(store)
    assert str(error.value) == (
        f"The drafter store {tmp_path} cannot be used (No space left on device); make room there "
        "or choose another folder. The versions in it are intact."
    )
    assert names(tmp_path) == before
    assert publish(store) == 2


def test_weights_that_are_written_in_part_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(EnvironmentProblem, match="File too large"):
            publish(store, size=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_a_full_disk_does_not_lose_the_notes_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    publish(store)
    store.note(1, "swapped in")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_space)
        with pytest.raises(EnvironmentProblem, match="No space left on device"):
            store.note(1, "rolled back", rejected=True)
    assert [note["text"] for note in store.notes(1)] == ["swapped in"]


class Publishers:
    """Processes that publish and are killed; see `publisher`."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, publisher.__file__, str(root)]
        pipe = subprocess.PIPE
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def killed(self, how: str) -> bool:
        """Let the process publish and be killed; return whether it was."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(how, file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        assert status in (0, signal.SIGKILL)
        return status != 0

    def __enter__(self) -> Publishers:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def assert_whole(store: Store) -> None:
    """Every version of a publisher that can be seen can be loaded."""
    for version in store.versions():
        store.load(version, Expected("eagle3", publisher.BASE, publisher.SPECS))


def test_a_publisher_that_is_killed_leaves_whole_versions(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    dice = random.Random(0)
    with Publishers(tmp_path) as publishers:
        for _ in range(3):
            assert not publishers.killed("step 1000")
        for step in itertools.count():  # at each of its steps
            before = store.latest()
            killed = publishers.killed(f"step {step}")
            assert len(store.versions()) >= 2
            assert_whole(store)
            assert killed or store.latest() == (before or 0) + 1
            if not killed:
                break
        assert step > 10
        for _ in range(10):  # and at random moments
            before = store.latest()
            assert publishers.killed(f"after {dice.uniform(0, 0.03)}")
            assert (store.latest() or 0) > (before or 0)
            assert_whole(store)
        assert not publishers.killed("step 1000")
    assert len(names(tmp_path)) == 2
    assert all(name.startswith("v") for name in names(tmp_path))


def test_what_others_are_writing_is_left_alone_until_it_is_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dead = child(lambda: None)
    os.waitpid(dead, 0)
    host = os.uname().nodename
    mine, elsewhere, ended, forgotten = (
        tmp_path / f".tmp-{name}"
        for name in (
            f"a@{os.getpid()}@{host}",
            "b@1@elsewhere",
            f"c@{dead}@{host}",
            "d@1@elsewhere",
        )
    )
    for path in (mine, elsewhere, ended, forgotten):
        path.mkdir()
    os.utime(forgotten, (0, time.time() - files.OLD_SECONDS - 5))
    publish(store)
    assert names(tmp_path) == sorted([mine.name, elsewhere.name, "v000001"])


# ---- what is not loaded --------------------------------------------------------------------------


def rewrite(folder: Path, tensors: dict[str, Tensor] | None = None, **fields: Any) -> None:
    """Change a version so that its checksum is right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if tensors is not None:
        data = save(tensors)
        (folder / WEIGHTS).write_bytes(data)
        manifest |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / MANIFEST).write_text(json.dumps(manifest | fields))


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], type[BadVersion], str]] = {
    "removed": (shutil.rmtree, manifest.NoVersion, "does not exist"),
    "no manifest": (lambda v: (v / MANIFEST).unlink(), manifest.NoManifest, "has no manifest"),
    "no weights": (lambda v: (v / WEIGHTS).unlink(), manifest.Truncated, "cannot be read"),
    "cut": (lambda v: os.truncate(v / WEIGHTS, 100), manifest.Truncated, "have 100 bytes, not"),
    "empty": (lambda v: os.truncate(v / WEIGHTS, 0), manifest.Truncated, "have 0 bytes, not"),
    "a bit of the weights": (
        lambda v: flip(v / WEIGHTS, -3),
        manifest.Damaged,
        "the checksum of its weights is not",
    ),
    "a bit of the header": (
        lambda v: flip(v / WEIGHTS, 12),
        manifest.Damaged,
        "the checksum of its weights is not",
    ),
    "cut manifest": (
        lambda v: os.truncate(v / MANIFEST, 50),
        manifest.BadManifest,
        "cannot be read",
    ),
    "deep manifest": (
        lambda v: (v / MANIFEST).write_text("[" * 100_000),
        manifest.BadManifest,
        "cannot be read",
    ),
    "list as manifest": (
        lambda v: (v / MANIFEST).write_text("[]"),
        manifest.BadManifest,
        "cannot be read",
    ),
    "more in the manifest": (lambda v: rewrite(v, odd=1), manifest.BadManifest, "cannot be read"),
    "another format": (lambda v: rewrite(v, format=2), manifest.BadManifest, "another format"),
    "another version": (lambda v: rewrite(v, version=7), manifest.BadManifest, "of version 7"),
    "lies about a dtype": (
        lambda v: rewrite(v, weights() | {"fc.weight": torch.ones(8, 16).half()}),
        manifest.BadManifest,
        "wrong about fc.weight",
    ),
    "lies about a shape": (
        lambda v: rewrite(v, weights() | {"norm.weight": torch.ones(9)}),
        manifest.BadManifest,
        "wrong about norm.weight",
    ),
    "lies about names": (
        lambda v: rewrite(v, {**weights(), "more": torch.ones(1)}),
        manifest.BadManifest,
        "wrong about more",
    ),
    "NaN": (
        lambda v: rewrite(v, weights() | {"norm.weight": torch.full((8,), torch.nan)}),
        manifest.NotFinite,
        "norm.weight holds NaN",
    ),
    "infinity": (
        lambda v: rewrite(v, weights() | {"norm.weight": torch.full((8,), -torch.inf)}),
        manifest.NotFinite,
        "norm.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_told_by_its_own_error(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    publish(store)
    harm, kind, reason = DAMAGES[damage]
    harm(store.path(1))
    with pytest.raises(BadVersion, match=reason) as error:
        store.load(1, expected())
    assert type(error.value) is kind
    assert error.value.version == 1
    assert str(error.value).startswith("Drafter version 1 is not used: ")
    assert str(error.value).count(".") <= 5 and "\n" not in str(error.value)


def test_weights_that_are_no_safetensors_file_are_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    data = b"\xff" * 64
    (store.path(1) / WEIGHTS).write_bytes(data)
    rewrite(store.path(1), sha256=hashlib.sha256(data).hexdigest(), size=64)
    with pytest.raises(manifest.Damaged, match="not a safetensors file"):
        store.load(1, expected())


@pytest.mark.parametrize(
    ("expected", "kind", "reason"),
    [
        (expected(Base(16, 100, 50, 3)), manifest.WrongTarget, "target with hidden size 8, not 16"),
        (expected(Base(8, 99, 50, 3)), manifest.WrongTarget, "vocab size 100, not 99"),
        (expected(Base(8, 100, 9, 3)), manifest.WrongTarget, "draft vocab size 50, not 9"),
        (expected(Base(8, 100, 50, 4)), manifest.WrongTarget, "layers 3, not 4"),
        (expected(Base(8, 100, 50, 3, "other")), manifest.WrongTarget, "a digest, not other"),
        (expected(architecture="eagle"), manifest.WrongTarget, "an eagle3 drafter, not eagle"),
        (expected(more=Spec("F32", (1,))), manifest.WrongNames, "lacks more"),
        (Expected("eagle3", BASE, {}), manifest.WrongNames, "has an unknown fc.weight"),
        (expected(ids=Spec("I64", (5,))), manifest.WrongShape, r"ids is I64 \[4\], not I64 \[5\]"),
        (expected(ids=Spec("F32", (4,))), manifest.WrongShape, r"ids is I64 \[4\], not F32"),
    ],
)
def test_a_version_for_something_else_is_told(
    tmp_path: Path, expected: Expected, kind: type[BadVersion], reason: str
) -> None:
    store = Store(tmp_path)
    publish(store)
    with pytest.raises(kind, match=f"Drafter version 1 is not used: .*{reason}"):
        store.load(1, expected)


def test_a_target_without_a_name_takes_a_version_with_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    store.load(1, expected(Base(8, 100, 50, 3)))


def test_numbers_too_large_for_the_dtype_of_the_engine_are_not_finite(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.publish(weights() | {"norm.weight": torch.full((8,), 1e6)}, "eagle3", BASE)
    store.load(1, expected())
    half = expected()
    half = replace(half, tensors={**half.tensors, "norm.weight": Spec("F16", (8,))})
    with pytest.raises(manifest.NotFinite, match=r"norm\.weight"):
        store.load(1, half)


def test_no_flipped_bit_and_no_cut_gets_through(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    dice = random.Random(0)
    for name in (WEIGHTS, MANIFEST):
        path = store.path(1) / name
        whole = path.read_bytes()
        for _ in range(50):
            if dice.random() < 0.3:
                os.truncate(path, dice.randrange(len(whole) - 1))  # the last is a line feed
            else:
                flip(path, dice.randrange(len(whole)), 1 << dice.randrange(8))
            try:
                loaded = store.load(1, expected(Base(8, 100, 50, 3)))
            except BadVersion:
                pass
            else:  # in the gate's figures, say
                assert name == MANIFEST
                assert all(
                    torch.equal(loaded[n], w.to(loaded[n].dtype)) for n, w in weights().items()
                )
            path.write_bytes(whole)


# ---- notes ---------------------------------------------------------------------------------------


def test_a_rejected_version_is_not_the_latest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store), publish(store)
    store.note(2, "swapped in")
    assert store.latest() == 2 and not store.rejected(2)
    store.note(2, "rolled back", {"ratio": 0.4}, rejected=True)
    store.note(2, "seen")
    assert store.latest() == 1 and store.rejected(2)
    assert store.notes(2)[1] == {"text": "rolled back", "figures": {"ratio": 0.4}, "rejected": True}
    assert publish(store) == 3 and store.latest() == 3
    store.load(2, expected())


@pytest.mark.parametrize("content", ["", "{}", "[1]", "[" * 100_000])
def test_a_version_with_notes_that_cannot_be_read_counts_as_rejected(
    tmp_path: Path, content: str
) -> None:
    store = Store(tmp_path)
    publish(store)
    (store.path(1) / "notes.json").write_text(content)
    assert store.rejected(1) and store.latest() is None
    with pytest.raises(manifest.BadManifest, match="its notes"):
        store.note(1, "more")


def test_notes_of_several_engines_at_once_are_all_there(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)

    def engine(name: str) -> None:
        for index in range(8):
            store.note(1, f"{name}{index}")

    pids = [child(lambda name=name: engine(name)) for name in "abc"]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert sorted(n["text"] for n in store.notes(1)) == sorted(
        f"{n}{i}" for n in "abc" for i in range(8)
    )


def test_a_version_that_is_gone_takes_no_notes(tmp_path: Path) -> None:
    with pytest.raises(manifest.NoVersion, match="Drafter version 9 is not used"):
        Store(tmp_path).note(9, "rolled back")
