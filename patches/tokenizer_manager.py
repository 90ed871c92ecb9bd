"""sglang.srt.managers.tokenizer_manager, in the main process: counts of proposed drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics",
    why="SGLang counts the largest number of draft tokens of the pool for every step",
    remove_when="SGLang counts the drafts that each step proposed",
    process="main",
    digests={"0.5.23": "aa6dfb5ca1241c09"},
)
def calculate_spec_decoding_metrics(
    original: Upstream, manager: object, meta_info: dict[str, float], recv_obj: object, i: int
) -> None:
    original(manager, meta_info, recv_obj, i)
    verified = getattr(recv_obj, "spec_num_cap_tokens", None)
    if "spec_verify_ct" not in meta_info or not verified or not verified[i]:
        return
    # Each step verifies one token that is no draft.
    proposed = verified[i] - meta_info["spec_verify_ct"]
    meta_info["spec_num_proposed_drafts"] = proposed
    accepted = meta_info["spec_num_correct_drafts"]
    meta_info["spec_accept_rate"] = accepted / proposed if proposed else 0.0


PATCHES = (calculate_spec_decoding_metrics,)
