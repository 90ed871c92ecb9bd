"""sglang.srt.arg_groups.speculative_hook, in the main process: speculation on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.arg_groups.speculative_hook"
_REMOVE = "this shape of SGLang is not supported any more"


@wraps_upstream(
    f"{_MODULE}:handle_speculative_decoding",
    why="steps cannot overlap under speculation on CPU, where SGLang would try",
    remove_when=_REMOVE,
    process="main",
    only_on="cpu",
)
def handle_speculative_decoding(original: Upstream, args: Any) -> None:
    if args.speculative_algorithm is not None:
        args.disable_overlap_schedule = True
    original(args)


@wraps_upstream(
    f"{_MODULE}:_handle_ngram",
    why="SGLang refuses n-grams on CPU",
    remove_when=_REMOVE,
    process="main",
    only_on="cpu",
)
def handle_ngram(original: Upstream, args: Any) -> None:
    device, args.device = args.device, "cuda"
    try:
        original(args)
    finally:
        args.device = device


PATCHES = (handle_speculative_decoding, handle_ngram)
