"""The patcher on a small upstream package of its own: apply and revert, all or none."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakelang import (
    FACTS,
    MATHS,
    assert_same,
    everything,
    foreign,
    load,
    plus_100,
    register,
    snapshot,
    swap,
    wrap,
)
from tlt_sglang.errors import PatchError
from tlt_sglang.patching.patch import (
    replaces_upstream,
)
from tlt_sglang.patching.patcher import Patcher


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
