"""sglang.srt.managers.tokenizer_manager, in the main process: admission, seeds, draft counts."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import (
        Call,
        Manager,
        Request,
    )

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"


@wraps_upstream(
    f"{_MANAGER}._calculate_spec_decoding_metrics",
    why="SGLang counts the largest number of draft tokens of the pool for every step",
    remove_when="SGLang counts the drafts that each step proposed",
    process="main",
)
def calculate_spec_decoding_metrics(
    original: Upstream, manager: object, meta_info: dict[str, float], recv_obj: object, i: int
) -> None:
    from tlt_sglang.engine import engine

    original(manager, meta_info, recv_obj, i)
    verified = getattr(recv_obj, "spec_num_cap_tokens", None)
    if "spec_verify_ct" in meta_info and verified and verified[i]:
        # Each step verifies one token that is no draft.
        proposed = verified[i] - meta_info["spec_verify_ct"]
        meta_info["spec_num_proposed_drafts"] = proposed
        accepted = meta_info["spec_num_correct_drafts"]
        meta_info["spec_accept_rate"] = accepted / proposed if proposed else 0.0
    tlt = engine.require()
    tlt.clients.add_former_keys(meta_info, tlt.config)


@wraps_upstream(
    f"{_MANAGER}._init_req_state",
    why="a list that is too short for the requests of a call is answered with status 500",
    remove_when="SGLang checks the lengths of all lists of a call",
    process="main",
)
def init_req_state(
    original: Upstream, manager: Manager, obj: Call, *args: Any, **options: object
) -> object:
    from tlt_sglang.engine import admit

    return admit.begin(functools.partial(original, **options), manager, obj, *args)


@wraps_upstream(
    f"{_MANAGER}._validate_one_request",
    why="a request with a value that SGLang does not check ended the engine; all pass here",
    remove_when="SGLang checks every field of a request against the model before it is scheduled",
    process="main",
)
def validate_one_request(
    original: Upstream, manager: Manager, obj: Request, input_ids: list[int] | None
) -> None:
    from tlt_sglang.engine import admit

    admit.validated(original, manager, obj, input_ids)


@wraps_upstream(
    f"{_MANAGER}._create_tokenized_object",
    why="a value of a type that the scheduler cannot decode ended it",
    remove_when="SGLang checks the types of all fields before it sends a request",
    process="main",
)
def create_tokenized_object(
    original: Upstream, manager: Manager, obj: Request, *args: Any
) -> object:
    from tlt_sglang.engine import engine

    return engine.require().answers.tokenized(original, manager, obj, *args)


@wraps_upstream(
    f"{_MANAGER}._handle_batch_request",
    why="a call with one bad text scheduled the texts before it",
    remove_when="SGLang checks all requests of a call before it sends one",
    process="main",
)
def handle_batch_request(
    original: Upstream, manager: Manager, obj: Call, *args: Any
) -> AsyncIterator[object]:
    from tlt_sglang.engine import admit

    return admit.batch(original, manager, obj, *args)


PATCHES = (
    init_req_state,
    calculate_spec_decoding_metrics,
    validate_one_request,
    create_tokenized_object,
    handle_batch_request,
)
