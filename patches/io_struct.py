"""sglang.srt.managers.io_struct, in the main process: fields whose shapes do not fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.patching.patch import Patch
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import Call


def _normalized(kind: str) -> Patch:
    """Return the patch of one kind of request."""

    @wraps_upstream(
        f"sglang.srt.managers.io_struct:{kind}.normalize_batch_and_arguments",
        why="fields of the wrong shape raise whatever comes first, which is answered as our fault",
        remove_when="SGLang raises ValueError for every field that has the wrong shape",
        process="main",
    )
    def normalize(original: Upstream, request: Call) -> None:
        from tlt_sglang.engine import admit

        admit.split(original, request, generates=kind == "GenerateReqInput")

    return normalize


PATCHES = (
    _normalized("GenerateReqInput"),
    _normalized("EmbeddingReqInput"),
)
