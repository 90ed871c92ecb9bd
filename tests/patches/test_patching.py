"""The patcher on a small upstream package of its own: apply, revert, refuse; and the CLI."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import apply_patches
from tlt_sglang.errors import ConfigError, EnvironmentProblem, PatchError
from tlt_sglang.patching.patch import (
    Patch,
    registers_upstream,
    replaces_upstream,
    table,
    wraps_upstream,
)
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.patching.source import SourceTree, source_digest
from tlt_sglang.upstream import versions

VERSION = "1.2.3"

MATHS = '''"""Upstream."""
import functools
LIMIT = 3
NOTHING = None
TABLE = {"a": 1, "b": 2}
CHOICES = ["x", "y"]

def double(value):
    """Twice."""
    return value * 2

async def later(value):
    return value

@functools.lru_cache
def cached(value):
    return value

class Worker:
    width: int = 4

    def run(self, value):
        return value + 1

    @staticmethod
    def still(value):
        return value + 2

    @classmethod
    def make(cls, value):
        return cls, value

    @property
    def size(self):
        return 5

    @size.setter
    def size(self, value):
        self.stored = value

    @functools.cached_property
    def once(self):
        return 6
'''

USER = """from fakelang.maths import LIMIT, NOTHING, Worker, cached, double
try:
    from fakelang.absent import kernel
except ImportError:
    kernel = None

def use(value):
    return double(value)
"""

FACTS: dict[str, Any] = {"why": "a test", "remove_when": "never", "process": "any"}


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "fakelang"
    (root / "deep").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "maths.py").write_text(MATHS)
    (root / "user.py").write_text(USER)
    (root / "deep" / "__init__.py").write_text("from ..maths import double as twice\n")
    info = tmp_path / f"fakelang-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fakelang\nVersion: {VERSION}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "fakelang"]:
        del sys.modules[name]
    assert sys.meta_path == finders


def load(name: str) -> Any:
    return importlib.import_module(f"fakelang.{name}")


def digest(target: str) -> str:
    module, qualname = target.split(":")
    return source_digest(SourceTree.from_installed("fakelang").read(module), qualname)


def with_digests(patch: Patch) -> Patch:
    return replace(patch, digests={VERSION: digest(patch.target)})


def wrap(name: str, change: Callable[..., Any], module: str = "maths", **more: Any) -> Patch:
    target = f"fakelang.{module}:{name}"
    return with_digests(wraps_upstream(target, **FACTS, **more)(change))


def swap(name: str, value: Any, module: str = "maths", **more: Any) -> Patch:
    target = f"fakelang.{module}:{name}"
    return with_digests(replaces_upstream(target, value, **FACTS, **more))


def register(name: str, key: Any, value: Any) -> Patch:
    target = f"fakelang.maths:{name}"
    return with_digests(registers_upstream(target, key, value, **FACTS))


def plus_100(original: Any, *args: Any) -> Any:
    return original(*args) + 100


@pytest.fixture
def patcher_of(upstream: Path) -> Iterator[Callable[..., Patcher]]:
    """Makes patchers on the fake upstream, and takes their patches back after the test."""
    made: list[Patcher] = []

    def make(*patches: Patch, device: Any = "cpu") -> Patcher:
        made.append(Patcher(patches, device))
        return made[-1]

    yield make
    for patcher in reversed(made):
        patcher.revert()


def everything() -> list[Patch]:
    return [
        wrap("double", plus_100),
        wrap("Worker.run", plus_100),
        swap("LIMIT", 9),
        register("TABLE", "b", 20),
        wrap("use", plus_100, module="user"),
    ]


def snapshot() -> dict[str, Any]:
    """Return every object of the upstream package by its place."""
    objects: dict[str, Any] = {}
    for name in [n for n in sys.modules if n.split(".")[0] == "fakelang"]:
        for attribute, value in vars(sys.modules[name]).items():
            if not attribute.startswith("__"):
                objects[f"{name}.{attribute}"] = value
    maths = sys.modules["fakelang.maths"]
    objects |= {f"Worker.{name}": value for name, value in vars(maths.Worker).items()}
    objects |= {f"TABLE.{index}": item for index, item in enumerate(maths.TABLE.items())}
    objects |= {f"CHOICES.{index}": item for index, item in enumerate(maths.CHOICES)}
    return objects


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert value == after[name], name
        else:
            assert value is after[name], name


# ---- apply and revert


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::5])
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_every_order(
    patcher_of: Callable[..., Patcher], order: tuple[int, ...], loaded: str
) -> None:
    patches = everything()
    maths, user = (load("maths"), load("user")) if loaded == "before" else (None, None)
    before = snapshot() if maths else {}
    patcher = patcher_of(*(patches[i] for i in order))
    patcher.apply()
    maths, user = load("maths"), load("user")
    assert (maths.double(1), user.use(1), maths.Worker().run(1)) == (102, 202, 102)
    assert (maths.LIMIT, maths.TABLE) == (9, {"a": 1, "b": 20})
    patcher.verify()
    patcher.revert()
    if before:
        assert_same(before, snapshot())
    assert (maths.double(1), user.use(1), maths.Worker().run(1)) == (2, 2, 2)
    assert (maths.LIMIT, maths.TABLE) == (3, {"a": 1, "b": 2})


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_patcher_each_reverted_in_any_order(
    patcher_of: Callable[..., Patcher], order: tuple[int, ...]
) -> None:
    load("user")
    before = snapshot()
    patchers = [
        patcher_of(patch)
        for patch in (wrap("double", plus_100), swap("LIMIT", 9), register("CHOICES", None, "z"))
    ]
    for patcher in patchers:
        patcher.apply()
    for index in order:
        patchers[index].revert()
    assert_same(before, snapshot())


def test_twice_is_once_and_it_can_be_applied_again(patcher_of: Callable[..., Patcher]) -> None:
    maths = load("maths")
    patcher = patcher_of(wrap("double", plus_100), register("CHOICES", None, "z"))
    patcher.apply()
    ours = maths.double
    patcher.apply()
    assert maths.double is ours
    assert maths.CHOICES == ["x", "y", "z"]
    patcher.revert()
    patcher.revert()
    assert maths.CHOICES == ["x", "y"]
    patcher.apply()
    assert maths.double(1) == 102


def test_stale_bindings_follow_functions_and_classes_only(
    patcher_of: Callable[..., Patcher],
) -> None:
    maths, user, deep = load("maths"), load("user"), load("deep")
    ours = type("Ours", (maths.Worker,), {})
    patches = [
        wrap("double", plus_100),
        wrap("cached", plus_100),
        swap("Worker", ours),
        swap("LIMIT", 9),
        swap("NOTHING", "something"),
    ]
    before = snapshot()
    patcher = patcher_of(*patches)
    patcher.apply()
    assert user.double is deep.twice is maths.double
    assert user.cached(1) == 101
    assert user.Worker is maths.Worker is ours
    assert (user.LIMIT, user.NOTHING, user.kernel) == (3, None, None)
    patcher.revert()
    assert_same(before, snapshot())


def test_an_imported_name_is_replaced_only_where_it_was_imported(
    patcher_of: Callable[..., Patcher],
) -> None:
    maths, user, deep = load("maths"), load("user"), load("deep")
    original = maths.double
    patcher_of(wrap("double", plus_100, module="user"), swap("kernel", max, module="user")).apply()
    assert user.use(1) == 102
    assert user.kernel is max
    assert maths.double is deep.twice is original


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_name_patched_where_defined_and_where_imported(
    patcher_of: Callable[..., Patcher], order: tuple[int, int]
) -> None:
    load("user")
    before = snapshot()
    patches = (wrap("double", plus_100), wrap("double", plus_100, module="user"))
    patcher = patcher_of(*(patches[i] for i in order))
    patcher.apply()
    assert load("user").use(1) == 202
    patcher.verify()
    patcher.revert()
    assert_same(before, snapshot())


def test_nothing_is_imported_because_of_us(patcher_of: Callable[..., Patcher]) -> None:
    patcher = patcher_of(*everything())
    patcher.apply()
    assert not [name for name in sys.modules if name.split(".")[0] == "fakelang"]
    assert {row["state"] for row in patcher.report()} == {"waiting for import"}
    patcher.verify()
    user = load("user")
    assert {row["state"] for row in patcher.report()} == {"in force"}
    assert user.use(1) == 202
    assert "return double(value)" in inspect.getsource(inspect.unwrap(user.use))
    assert type(user.__loader__).__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(user.__loader__)


def test_revert_reaches_what_was_imported_since(patcher_of: Callable[..., Patcher]) -> None:
    maths = load("maths")
    original = maths.double
    patcher = patcher_of(swap("double", foreign), swap("LIMIT", 9))
    patcher.apply()
    user, deep = load("user"), load("deep")
    assert user.double is deep.twice is foreign
    patcher.revert()
    assert user.double is deep.twice is maths.double is original


def test_a_reloaded_module_is_patched_anew(patcher_of: Callable[..., Patcher]) -> None:
    patcher = patcher_of(wrap("double", plus_100))
    patcher.apply()
    maths = importlib.reload(load("maths"))
    assert maths.double(1) == 102
    patcher.verify()
    patcher.revert()
    assert maths.double(1) == 2


def test_members_keep_their_kind(patcher_of: Callable[..., Patcher]) -> None:
    worker = load("maths").Worker
    patcher_of(
        wrap("Worker.still", plus_100),
        wrap("Worker.make", lambda original, cls, value: original(cls, value + 100)),
        wrap("Worker.size", plus_100),
        wrap("Worker.once", plus_100),
        swap("Worker.width", 8),
    ).apply()
    one = worker()
    assert (worker.still(1), one.still(1), worker.make(1)) == (103, 103, (worker, 101))
    assert (one.size, one.once, one.width) == (105, 106, 8)
    one.size = 7
    assert one.stored == 7
    assert one.__dict__["once"] == 106
    assert isinstance(vars(worker)["still"], staticmethod)


def test_a_plain_function_in_the_place_of_a_member_becomes_one(
    patcher_of: Callable[..., Patcher],
) -> None:
    worker = load("maths").Worker

    def ours(*args: Any) -> Any:
        return args

    patcher_of(
        swap("Worker.still", ours), swap("Worker.make", ours), swap("Worker.size", ours)
    ).apply()
    one = worker()
    assert (one.still(1), one.make(1), one.size) == ((1,), (worker, 1), (one,))


def test_coroutines_stay_coroutines(patcher_of: Callable[..., Patcher]) -> None:
    async def change(original: Any, value: int) -> int:
        return int(await original(value)) + 100

    patcher_of(wrap("later", change)).apply()
    later = load("maths").later
    assert inspect.iscoroutinefunction(later)
    assert asyncio.run(later(1)) == 101


def test_registry_entries_come_back_exactly(patcher_of: Callable[..., Patcher]) -> None:
    maths = load("maths")
    prior = maths.TABLE["a"] = object()
    patcher = patcher_of(
        register("TABLE", "a", "ours"), register("TABLE", "c", 3), register("CHOICES", None, "x")
    )
    patcher.apply()
    assert maths.TABLE == {"a": "ours", "b": 2, "c": 3}
    assert maths.CHOICES == ["x", "y", "x"]
    patcher.revert()
    assert maths.TABLE["a"] is prior
    assert list(maths.TABLE) == ["a", "b"]
    assert maths.CHOICES == ["x", "y"]


def test_a_new_attribute_of_a_class_goes_again(patcher_of: Callable[..., Patcher]) -> None:
    worker = load("maths").Worker
    patcher = patcher_of(register("Worker", "height", 5))
    patcher.apply()
    assert worker.height == worker().height == 5
    patcher.verify()
    patcher.revert()
    assert not hasattr(worker, "height")
    with pytest.raises(PatchError, match="the name of a new attribute for a class"):
        patcher_of(register("Worker", "width", 5)).apply()


def test_other_devices_are_left_alone(patcher_of: Callable[..., Patcher]) -> None:
    broken = {"1.2.3": "0" * 16}
    patcher = patcher_of(
        replace(wrap("double", plus_100, only_on="cuda"), digests=broken),
        swap("LIMIT", 9, only_on="cpu"),
    )
    patcher.apply()
    assert load("maths").double(1) == 2
    assert [row["state"] for row in patcher.report()] == ["not for this device", "in force"]
    Patcher([], "cpu").apply()


# ---- all or none


def test_a_changed_source_stops_everything(
    patcher_of: Callable[..., Patcher], upstream: Path
) -> None:
    load("user")
    before = snapshot()
    patches = everything()
    text = MATHS.replace("value * 2", "value * 3").replace("LIMIT = 3\n", "")
    (upstream / "maths.py").write_text(text)
    with pytest.raises(PatchError) as caught:
        patcher_of(*patches).apply()
    assert "fakelang.maths:double in SGLang 1.2.3 has changed" in str(caught.value)
    assert "fakelang.maths:LIMIT in SGLang 1.2.3 is missing" in str(caught.value)
    assert "Worker.run" not in str(caught.value)
    assert_same(before, snapshot())


def test_failing_in_the_middle_undoes_all(patcher_of: Callable[..., Patcher]) -> None:
    load("user")
    before = snapshot()

    def fail(original: Any) -> Any:
        raise ZeroDivisionError

    patches = everything()
    patches[3:3] = [replace(swap("NOTHING", 1), make=fail)]
    patcher = patcher_of(*patches)
    with pytest.raises(PatchError, match=r"Patching fakelang\.maths:NOTHING failed"):
        patcher.apply()
    assert_same(before, snapshot())
    with pytest.raises(PatchError, match="not applied"):
        patcher.verify()


def test_failing_after_an_import_is_loud_and_stays_known(
    patcher_of: Callable[..., Patcher],
) -> None:
    patcher = patcher_of(swap("LIMIT", 9), wrap("Worker", plus_100))
    patcher.apply()
    with pytest.raises(PatchError, match="Worker is a class"):
        load("maths")
    with pytest.raises(PatchError, match="Worker is a class"):
        patcher.verify()


def test_a_registry_of_another_kind_is_refused(patcher_of: Callable[..., Patcher]) -> None:
    load("maths")
    for name, key in (("TABLE", None), ("CHOICES", "a"), ("LIMIT", "a")):
        with pytest.raises(PatchError, match="use a key for a dict"):
            patcher_of(register(name, key, 1)).apply()


def test_patches_in_each_others_way_are_refused(patcher_of: Callable[..., Patcher]) -> None:
    with pytest.raises(PatchError, match="has two patches"):
        patcher_of(wrap("double", plus_100), swap("double", abs)).apply()
    with pytest.raises(PatchError, match="patched as a whole and in"):
        patcher_of(wrap("Worker.run", plus_100), swap("Worker", int)).apply()
    with pytest.raises(PatchError, match="is not valid; write"):
        swap_target = "fakelang.maths.double"
        replaces_upstream(swap_target, 1, **FACTS)


# ---- double ownership


def foreign(*args: Any) -> Any:
    return args


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("double", foreign),
        ("double", SimpleNamespace(__module__="elsewhere")),
        ("Worker", type("Worker", (), {"run": foreign})),
        ("Worker.run", foreign),
        ("Worker.still", staticmethod(foreign)),
        ("Worker.size", property(foreign)),
    ],
)
def test_what_someone_else_patched_is_refused(
    patcher_of: Callable[..., Patcher], name: str, value: Any
) -> None:
    maths = load("maths")
    *owner, last = name.split(".")
    setattr(getattr(maths, owner[0]) if owner else maths, last, value)
    before = snapshot()
    patch = swap(name, 1)
    with pytest.raises(PatchError, match=f"{name} is already patched by other code.*disable one"):
        patcher_of(swap("LIMIT", 9), patch).apply()
    assert_same(before, snapshot())


def test_a_second_patcher_and_a_foreign_import_are_refused(
    patcher_of: Callable[..., Patcher],
) -> None:
    user = load("user")
    patcher_of(wrap("double", plus_100)).apply()
    with pytest.raises(PatchError, match=r"other code \(tlt_sglang.patching.patch\)"):
        patcher_of(wrap("double", plus_100)).apply()
    user.double = foreign
    with pytest.raises(PatchError, match=f"user:double is already .*{__name__}"):
        patcher_of(wrap("double", plus_100, module="user")).apply()


def test_a_foreign_patch_is_seen_after_an_import_too(
    patcher_of: Callable[..., Patcher], upstream: Path
) -> None:
    patcher = patcher_of(swap("LIMIT", 9), wrap("double", plus_100))
    patcher.apply()
    (upstream / "maths.py").write_text(MATHS + "double = abs\n")
    with pytest.raises(PatchError, match=r"double is already patched by other code \(builtins\)"):
        load("maths")


def test_a_hook_of_another_plugin_is_refused(
    patcher_of: Callable[..., Patcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    load("maths")
    module = ModuleType("sglang.srt.plugins.hook_registry")
    hook = ("around", foreign, SimpleNamespace(plugin_name="other"))
    vars(module)["HookRegistry"] = SimpleNamespace(_hooks={"fakelang.maths.Worker.run": [hook]})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(PatchError, match=r"Worker.run .*\(the SGLang plugin other\)"):
        patcher_of(wrap("Worker.run", plus_100)).apply()


# ---- verify


def test_verify_names_what_is_no_longer_in_force(patcher_of: Callable[..., Patcher]) -> None:
    maths = load("maths")
    patcher = patcher_of(
        wrap("double", plus_100), wrap("Worker.run", plus_100), register("TABLE", "b", 20)
    )
    with pytest.raises(PatchError, match="not applied"):
        patcher.verify()
    patcher.apply()
    patcher.verify()
    maths.double, maths.TABLE["b"] = foreign, 2
    with pytest.raises(PatchError) as caught:
        patcher.verify()
    assert "maths:double is not in force" in str(caught.value)
    assert "maths:TABLE is not in force" in str(caught.value)
    assert "Worker" not in str(caught.value)


def test_verify_sees_a_module_that_came_in_past_us(patcher_of: Callable[..., Patcher]) -> None:
    patcher = patcher_of(wrap("double", plus_100))
    patcher.apply()
    ours = sys.meta_path.pop(0)
    with pytest.raises(PatchError, match="not in force"):
        patcher.verify()
    load("maths")
    sys.meta_path.insert(0, ours)
    with pytest.raises(PatchError, match="not in force"):
        patcher.verify()


@pytest.mark.parametrize("before", [True, False])
def test_a_subclass_in_the_place_of_its_base(
    patcher_of: Callable[..., Patcher], before: bool
) -> None:
    """As stacks do it, before or after we patch: the base is patched, the override is theirs."""
    maths = load("maths")
    base = maths.Worker
    Own = type("Own", (base,), {"run": lambda self, value: base.run(self, value) * 10})
    patcher = patcher_of(wrap("Worker.run", plus_100), wrap("Worker.size", plus_100))
    if before:
        maths.Worker = Own
    patcher.apply()
    maths.Worker = Own
    patcher.verify()
    assert (maths.Worker().run(1), maths.Worker().size) == (1020, 105)
    patcher.revert()
    assert (maths.Worker().run(1), maths.Worker().size) == (20, 5)
    base.run = foreign
    with pytest.raises(PatchError, match=r"Worker.run is already patched by other code"):
        patcher.apply()


# ---- digests and sources


def test_the_digest_is_of_the_code_alone() -> None:
    plain = "def f(a, b=1):\n    def g():\n        return 'x'\n    return a + b\n"
    dressed = (
        "X = 1\n\ndef f( a,\n  b = 1 ):  # why\n    '''Doc.'''\n\n    def g():\n"
        "        '''Doc.'''\n        return \"x\"\n    return (a + b)\n"
    )
    digest = source_digest(plain, "f")
    assert digest == source_digest(dressed, "f")
    assert len(digest) == 16
    for change in (("b=1", "b=2"), ("'x'", "'y'"), ("a + b", "b + a"), ("def f", "async def f")):
        assert source_digest(plain.replace(*change), "f") != digest


def test_the_digest_does_not_depend_on_the_python_version() -> None:
    """The value was computed on 3.11; f-strings are where versions differ."""
    source = "@d\nasync def f(a: int = 1, *b, **c) -> None:\n    return f\"{a!r:>{b['x']}} it's\"\n"
    assert source_digest(source, "f") == "c2654ad9f29552ff"


@pytest.mark.parametrize(
    ("source", "name", "changed"),
    [
        ("if x:\n    def f(): return 1\nelse:\n    def f(): return 2\n", "f", ("2", "3")),
        ("try:\n    from a import f\nexcept ImportError:\n    f = None\n", "f", ("None", "0")),
        ("from a import b, c as f\n", "f", ("c as", "d as")),
        ("import a.b\n", "a", ("a.b", "a.c")),
        ("with x:\n    A, (B, C) = 1, (2, 3)\n", "C", ("3", "4")),
        ("A: int = 1\nA += 1\n", "A", ("+= 1", "+= 2")),
        (
            "class A:\n    class B:\n        if x:\n            def f(self): pass\n",
            "A.B.f",
            ("pass", "1"),
        ),
        ("class A:\n    x: int = 1\n", "A.x", ("1", "2")),
    ],
)
def test_where_names_are_found(source: str, name: str, changed: tuple[str, str]) -> None:
    assert source_digest(source, name) != source_digest(source.replace(*changed), name)


def test_other_names_of_an_import_do_not_count() -> None:
    assert source_digest("from a import b, c", "c") == source_digest("from a import (d, c)", "c")


def test_a_name_that_is_not_there_is_an_error() -> None:
    for source in ("def g():\n    f = 1\n", "x.f = 1\nprint(f)\nd[f] = 1\n", "class f(: pass"):
        with pytest.raises(PatchError):
            source_digest(source, "f")


def wheel(path: Path, maths: str, version: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fakelang/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr("fakelang/maths.py", maths)
        archive.writestr(f"fakelang-{version}.dist-info/METADATA", "Name: fakelang\n")
    return path


def test_trees(upstream: Path, tmp_path: Path) -> None:
    (upstream / "__init__.py").write_text("raise RuntimeError('imported')\n")
    installed = SourceTree.from_installed("fakelang")
    packed = SourceTree.from_wheel(wheel(tmp_path / "one.whl", MATHS, "2.0"))
    assert (installed.version, packed.version) == (VERSION, "2.0")
    assert installed.read("fakelang.maths") == packed.read("fakelang.maths") == MATHS
    assert "RuntimeError" in packed.read("fakelang")
    for tree in (installed, packed):
        with pytest.raises(PatchError, match=r"no module fakelang\.absent"):
            tree.read("fakelang.absent")
    with pytest.raises(EnvironmentProblem, match="not installed"):
        SourceTree.from_installed("fakelang_absent")
    with pytest.raises(ConfigError, match="not a wheel"):
        SourceTree.from_wheel(zip_without_metadata(tmp_path))


def zip_without_metadata(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "plain.zip", "w") as archive:
        archive.writestr("a.py", "")
    return folder / "plain.zip"


def test_another_version_is_told_apart(upstream: Path, tmp_path: Path) -> None:
    patcher = Patcher([wrap("double", plus_100), wrap("Worker.run", plus_100)], "any")
    changed = MATHS.replace("value * 2", "value * 3")
    one, two = patcher.check(SourceTree.from_wheel(wheel(tmp_path / "w.whl", changed, "2.0")))
    assert "double in SGLang 2.0 has no digest and differs from 1.2.3" in one
    assert "Worker.run in SGLang 2.0 is the same as in 1.2.3: test the patch there." in two
    assert patcher.check(SourceTree.from_installed("fakelang")) == []


# ---- the command line


def two_patches() -> tuple[Patch, Patch]:
    one = wrap("double", plus_100)
    return replace(one, file="maths.py"), swap("LIMIT", 9, only_on="cuda")


@pytest.fixture
def command(
    upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    patches = two_patches()
    installed = SourceTree.from_installed("fakelang")
    monkeypatch.setattr(apply_patches, "all_patches", lambda: patches)
    monkeypatch.setattr(apply_patches, "patches_of", lambda shape: patches)
    monkeypatch.setattr(versions, "SHAPES", {VERSION: "v1"})
    monkeypatch.setattr(SourceTree, "from_installed", lambda package: installed)
    points = [SimpleNamespace(name="tlt", value=apply_patches.ENTRY_POINT)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)

    def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
        code = apply_patches.main(arguments, environ)
        return (code, *capsys.readouterr())

    return run


def test_no_argument_explains(command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = command()
    assert (code, err) == (0, "")
    assert "loads TLT's plugin" in out
    assert "TLT is off" in out
    assert "fakelang.maths:double fits." in out
    assert "TLT is on" in command(TLT_CONFIG="x.toml")[1]
    code, out, _ = command(SGLANG_PLUGINS="other")
    assert code == 1
    assert "SGLANG_PLUGINS excludes TLT" in out
    assert command(SGLANG_PLUGINS="other, tlt")[0] == 0


def test_no_plugin_no_patches(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    code, out, _ = command()
    assert code == 1
    assert "run `pip install -e .`" in out


def test_check(
    command: Callable[..., tuple[int, str, str]], upstream: Path, tmp_path: Path
) -> None:
    assert command("--check") == (0, "SGLang 1.2.3: nothing breaks (2 patches checked).\n", "")
    same = wheel(tmp_path / "same.whl", MATHS, VERSION)
    assert command("--check", str(same))[0] == 0
    other = wheel(tmp_path / "other.whl", MATHS.replace("LIMIT = 3", "MOST = 3"), VERSION)
    code, out, _ = command("--check", str(other))
    assert code == 1
    assert "fakelang.maths:LIMIT in SGLang 1.2.3 is missing" in out
    assert "1 problem with SGLang 1.2.3." in out
    newer = wheel(tmp_path / "newer.whl", MATHS.replace("value * 2", "value * 3"), "2.0")
    code, out, _ = command("--check", str(newer))
    assert code == 1
    assert "SGLang 2.0 is not supported; TLT runs on 1.2.3. The nearest shape is v1: of its" in out
    assert "2 targets 1 are the same, 1 differ, 0 are missing." in out
    (upstream / "maths.py").write_text("")
    assert command()[0] == command("--check")[0] == 1


def test_bad_requests_get_one_sentence(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "not.whl").write_text("no zip")
    for arguments in (
        ["--check", str(tmp_path / "absent.whl")],
        ["--check", str(tmp_path / "not.whl")],
        ["--frob"],
        ["--list", "--check"],
    ):
        code, out, err = command(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("apply_patches.py: ")


def test_writes_digests(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apply_patches, "DIGESTS", tmp_path)
    assert command("--write-digests")[0] == 0
    expected = {
        target: digest(target) for target in ("fakelang.maths:double", "fakelang.maths:LIMIT")
    }
    assert json.loads((tmp_path / f"{VERSION}.json").read_text()) == expected

    # A wheel of an unknown version, and one that lacks a target: nothing is written.
    (tmp_path / f"{VERSION}.json").unlink()
    unknown = wheel(tmp_path / "unknown.whl", MATHS, "2.0")
    assert "SGLang 2.0 has no shape: add it to" in command("--write-digests", str(unknown))[2]
    lacking = wheel(tmp_path / "lacking.whl", MATHS.replace("LIMIT = 3", "MOST = 3"), VERSION)
    code, out, _ = command("--write-digests", str(lacking))
    assert code == 1 and "fakelang.maths:LIMIT in SGLang 1.2.3 is missing" in out
    assert list(tmp_path.glob("*.json")) == []


def test_lists_patches_and_writes_their_table(
    command: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (
        "fakelang.maths:LIMIT\n    replace, any process, on cuda only: a test"
        in command("--list")[1]
    )
    monkeypatch.setattr(apply_patches, "TABLE", tmp_path / "TABLE.md")
    assert command("--write-table")[0] == 0
    text = (tmp_path / "TABLE.md").read_text()
    assert text == table(two_patches(), [VERSION])
    assert "## maths.py" in text
    assert "| `fakelang.maths:LIMIT` | replace | any | cuda | a test | never |" in text
