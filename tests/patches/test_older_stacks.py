"""Stacks written for an older SGLang find its arguments and its base class as they were."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from patches import patches_for
from tlt_sglang.patching.patch import Patch
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.upstream import versions

pytestmark = pytest.mark.sglang


@contextmanager
def in_force(belongs: Callable[[Patch], bool]) -> Iterator[bool]:
    """Apply the patches of the installed SGLang that belong here; yield whether there are any."""
    ours = [one for one in patches_for(versions.installed()) if belongs(one)]
    patcher = Patcher(ours, "cpu")
    patcher.apply()
    try:
        patcher.verify()
        yield bool(ours)
    finally:
        patcher.revert()


def test_fields_are_those_of_the_record() -> None:
    from sglang.srt.server_args import ServerArgs

    was_dataclass = dataclasses.is_dataclass(ServerArgs)
    with in_force(lambda one: one.key == "__dataclass_fields__") as patched:
        assert patched != was_dataclass
        names = list(inspect.signature(ServerArgs).parameters)
        assert [one.name for one in dataclasses.fields(ServerArgs)] == names
        args = ServerArgs(model_path="none", tp_size=2)
        values = {one.name: getattr(args, one.name) for one in dataclasses.fields(args)}
        assert values["tp_size"] == 2
        assert ServerArgs(**values) == args == pickle.loads(pickle.dumps(args))
    assert dataclasses.is_dataclass(ServerArgs) == was_dataclass


def test_an_engine_without_sessions_can_be_made() -> None:
    from sglang.srt.entrypoints.EngineBase import EngineBase

    sessions = {"begin_weight_update", "end_weight_update"}

    def make() -> EngineBase:
        names = EngineBase.__abstractmethods__ - sessions
        members = {name: lambda self: None for name in names}
        return type("StackEngine", (EngineBase,), members)()

    has_sessions = sessions <= EngineBase.__abstractmethods__
    with in_force(lambda one: one.file.endswith("/engine_base.py")) as patched:
        assert patched == has_sessions
        engine = make()
        for name in sessions if has_sessions else ():
            with pytest.raises(NotImplementedError, match="StackEngine opens no"):
                getattr(engine, name)()
    if has_sessions:
        with pytest.raises(TypeError, match="abstract"):
            make()
