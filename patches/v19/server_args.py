"""sglang.srt.server_args, in the main process: seeds of requests work on CPU."""

from __future__ import annotations

from tlt_sglang.patching.patch import registers_upstream

PATCHES = tuple(
    registers_upstream(
        "sglang.srt.server_args:DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        None,
        name,
        why="seeds of requests need deterministic inference, which SGLang refuses on CPU; our "
        "backend is deterministic, as a row does not depend on its batch",
        remove_when="SGLang lists its CPU backends among the deterministic ones",
        process="main",
        only_on="cpu",
    )
    for name in ("torch_native", "intel_amx")
)
