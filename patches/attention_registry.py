"""sglang.srt.layers.attention.attention_registry, in the scheduler process: our CPU backend.

When an RL stack starts SGLang, its arguments are resolved before plugins load. So the backend takes
the names that SGLang resolves to on CPU, instead of a new name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import registers_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import ModelRunner


def _create(runner: ModelRunner) -> object:
    from tlt_sglang.cpu.attention import CpuAttnBackend

    return CpuAttnBackend(runner)


PATCHES = tuple(
    registers_upstream(
        "sglang.srt.layers.attention.attention_registry:ATTENTION_BACKENDS",
        name,
        _create,
        why="SGLang refuses speculation on torch_native and has no CPU backend without AMX",
        remove_when="SGLang supports target-verify and draft decoding on CPUs without AMX",
        process="scheduler",
        only_on="cpu",
    )
    for name in ("torch_native", "intel_amx")
)
