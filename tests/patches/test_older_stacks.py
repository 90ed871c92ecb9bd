"""Stacks written for an older SGLang find its arguments and its base class as they were."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from patches import all_patches
from tlt_sglang.patching.patcher import Patcher

pytestmark = pytest.mark.sglang


def test_fields_are_those_of_the_record() -> None:
    import msgspec
    from sglang.srt.server_args import ServerArgs

    (patch,) = (one for one in all_patches() if one.key == "__dataclass_fields__")
    patcher = Patcher([patch], "cpu")
    patcher.apply()
    try:
        patcher.verify()
        names = [one.name for one in msgspec.structs.fields(ServerArgs)]
        assert [one.name for one in dataclasses.fields(ServerArgs)] == names
        args = ServerArgs(model_path="m", tp_size=2)
        values = {one.name: getattr(args, one.name) for one in dataclasses.fields(args)}
        assert values["tp_size"] == 2
        assert ServerArgs(**values) == args == pickle.loads(pickle.dumps(args))
    finally:
        patcher.revert()
    assert not dataclasses.is_dataclass(ServerArgs)


def test_an_engine_without_sessions_can_be_made() -> None:
    from sglang.srt.entrypoints.EngineBase import EngineBase

    def make() -> EngineBase:
        names = EngineBase.__abstractmethods__ - {"begin_weight_update", "end_weight_update"}
        members = {name: lambda self: None for name in names}
        return type("StackEngine", (EngineBase,), members)()

    with pytest.raises(TypeError, match="abstract"):
        make()
    patcher = Patcher(
        [one for one in all_patches() if one.file == "from_v22/engine_base.py"], "cpu"
    )
    patcher.apply()
    try:
        engine = make()
        for call in (engine.begin_weight_update, engine.end_weight_update):
            with pytest.raises(NotImplementedError, match="StackEngine opens no"):
                call()
    finally:
        patcher.revert()
    with pytest.raises(TypeError, match="abstract"):
        make()
