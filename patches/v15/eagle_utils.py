"""sglang.srt.speculative.eagle_utils, in the scheduler process: trees and sampling on CPU.

SGLang knows no CPU there. It is led through its branch for Intel's GPUs, whose two kernels are
functions of their own; that branch, too, ignores the temperature.
"""

from __future__ import annotations

from tlt_sglang.cpu.branch import IS_CPU
from tlt_sglang.cpu.later import kernel
from tlt_sglang.patching.patch import Patch, replaces_upstream

_MODULE = "sglang.srt.speculative.eagle_utils"


def _on_cpu(name: str, value: object, why: str) -> Patch:
    return replaces_upstream(
        f"{_MODULE}:{name}",
        value,
        why=why,
        remove_when="this shape of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
    )


PATCHES = (
    _on_cpu("_is_xpu", IS_CPU, "SGLang has no branch for CPUs"),
    _on_cpu(
        "sgl_build_tree_kernel_triton",
        kernel("build_tree_kernel_efficient_cpu"),
        "SGLang launches a Triton kernel, also on CPU",
    ),
    _on_cpu(
        "verify_tree_greedy_triton",
        kernel("verify_tree_greedy_cpu"),
        "SGLang launches a Triton kernel, also on CPU",
    ),
)
