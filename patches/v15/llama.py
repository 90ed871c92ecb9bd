"""sglang.srt.models.llama, in the scheduler process: the embedding of a drafter on CPU."""

from __future__ import annotations

from tlt_sglang.cpu.no_device import TorchOfCpu
from tlt_sglang.patching.patch import Patch

PATCHES = (
    Patch(
        "sglang.srt.models.llama:torch",
        make=TorchOfCpu,
        why="a drafter that gets the target's embedding waits for a CUDA device, also on CPU",
        remove_when="this shape of SGLang is not supported any more",
        process="scheduler",
        only_on="cpu",
        kind="replace",
    ),
)
