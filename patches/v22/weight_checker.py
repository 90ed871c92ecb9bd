"""sglang.srt.utils.weight_checker, in the scheduler process: checksums of weights on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.no_device import TorchOfCpu
from tlt_sglang.patching.patch import Patch

PATCHES = (
    Patch(
        "sglang.srt.utils.weight_checker:torch",
        make=TorchOfCpu,
        why="upstream waits for a CUDA device before it computes checksums, also on CPU",
        remove_when="this version of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
        kind="replace",
    ),
)
