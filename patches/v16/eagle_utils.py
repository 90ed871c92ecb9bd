"""sglang.srt.speculative.eagle_utils, in the scheduler process: sampling on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.branch import IS_CPU
from tlt_sglang.patching.patch import replaces_upstream

PATCHES = (
    replaces_upstream(
        "sglang.srt.speculative.eagle_utils:_is_cpu",
        IS_CPU,
        why="upstream ignores the temperature in speculative decoding on CPU",
        remove_when="SGLang's CPU verification applies temperature, top-k, top-p and min-p",
        process="scheduler",
        only_on="cpu",
    ),
)
