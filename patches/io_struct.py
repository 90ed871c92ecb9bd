"""sglang.srt.managers.io_struct, in the main process: a call is checked before it is split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import Call


@wraps_upstream(
    "sglang.srt.managers.io_struct:GenerateReqInput.normalize_batch_and_arguments",
    why="a call whose form is wrong raised anything, or asked for any number of answers",
    remove_when="SGLang checks the types and lengths of a call's fields",
    process="main",
    digests={"0.5.23": "ba140b03d37e4d78"},
)
def normalize_batch_and_arguments(original: Upstream, call: Call) -> None:
    from tlt_sglang.engine import admit

    admit.split(original, call)


PATCHES = (normalize_batch_and_arguments,)
