"""sglang.srt.managers.tokenizer_control_mixin, in the main process: commands that need a GPU."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


def _needs_gpu(name: str) -> Any:
    @wraps_upstream(
        f"sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.{name}",
        why="the scheduler waits for a GPU that is not there, which ends the engine",
        remove_when="SGLang releases and resumes memory on CPU, or refuses to",
        process="main",
        only_on="cpu",
    )
    def command(original: Any, manager: object, *args: object) -> Awaitable[object]:
        from tlt_sglang.errors import BadRequest

        raise BadRequest(f"{name} needs a GPU, and this engine runs on CPU; leave the call out.")

    return command


PATCHES = (
    _needs_gpu("release_memory_occupation"),
    _needs_gpu("resume_memory_occupation"),
)
