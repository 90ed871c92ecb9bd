"""sglang.srt.entrypoints.EngineBase, in a stack's own process: engines without sessions."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import replaces_upstream


def _begin_weight_update(engine: object, selector: str = "all") -> object:
    """Refuse: this engine was written for an SGLang without sessions."""
    raise NotImplementedError(f"{type(engine).__name__} opens no weight-update session.")


def _end_weight_update(engine: object) -> object:
    """Refuse: this engine was written for an SGLang without sessions."""
    raise NotImplementedError(f"{type(engine).__name__} opens no weight-update session.")


def _concrete(name: str, method: object) -> Any:
    return replaces_upstream(
        f"sglang.srt.entrypoints.EngineBase:EngineBase.{name}",
        method,
        why="a stack's engine that was written before sessions cannot be made: it lacks abstract "
        "methods",
        remove_when="verl's engine has the methods",
        process="main",
    )


PATCHES = (
    _concrete("begin_weight_update", _begin_weight_update),
    _concrete("end_weight_update", _end_weight_update),
)
