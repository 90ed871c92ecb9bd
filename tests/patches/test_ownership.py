"""The patcher refuses what others have patched, and sees what is no longer in force."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.fakelang import (
    MATHS,
    assert_same,
    foreign,
    load,
    plus_100,
    register,
    snapshot,
    swap,
    wrap,
)
from tlt_sglang.errors import PatchError
from tlt_sglang.patching.patcher import Patcher


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
    with pytest.raises(PatchError, match=f"user:double is already .*{foreign.__module__}"):
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
