"""sglang.kernels.ops.speculative.reject_sampling, in the scheduler process: its kernel on CPU.

SGLang imports the other kernels of sampling from `sgl_kernel`, where our stand-in has them.
"""

from __future__ import annotations

from tlt_sglang.cpu import later
from tlt_sglang.patching.patch import replaces_upstream

PATCHES = (
    replaces_upstream(
        "sglang.kernels.ops.speculative.reject_sampling:chain_speculative_sampling_triton",
        later.verify_rejection,
        why="upstream's kernel is written in Triton, which does not support CPUs",
        remove_when="SGLang's CPU verification applies temperature, top-k, top-p and min-p",
        process="scheduler",
        only_on="cpu",
    ),
)
