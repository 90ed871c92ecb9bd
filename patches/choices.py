"""sglang.srt.arg_groups.choices, in the main process: seeds of requests count on CPU, too."""

from __future__ import annotations

from tlt_sglang.patching.patch import registers_upstream

PATCHES = tuple(
    registers_upstream(
        "sglang.srt.arg_groups.choices:DETERMINISTIC_ATTENTION_BACKEND_CHOICES",
        None,
        name,
        why="the seed of a request counts with deterministic inference only, refused on CPU; our "
        "backend computes a row the same whatever its batch",
        remove_when="SGLang lists its CPU backends among the deterministic ones",
        process="main",
        only_on="cpu",
        digests={"0.5.23": "683bd127bd21e505"},
    )
    for name in ("torch_native", "intel_amx")
)
