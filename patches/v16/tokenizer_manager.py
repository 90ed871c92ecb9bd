"""sglang.srt.managers.tokenizer_manager, in the main process: the seed of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import Answer, Manager, TokenizedRequest

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"


@wraps_upstream(
    f"{_MANAGER}._send_one_request",
    why="all samples of a request with a seed were the same text",
    remove_when="SGLang gives each sample of a request a seed of its own",
    process="main",
)
def send_one_request(original: Upstream, manager: Manager, tokenized_obj: TokenizedRequest) -> None:
    from tlt_sglang.engine import engine

    original(manager, tokenized_obj)
    engine.require().answers.sent(manager, tokenized_obj)


@wraps_upstream(
    f"{_MANAGER}._wait_one_response",
    why="the seed of an answer is not reported, and answers are not logged for a replay",
    remove_when="SGLang reports the seed of each answer in its meta_info",
    process="main",
)
def wait_one_response(
    original: Upstream, manager: Manager, obj: Any, *args: object
) -> AsyncGenerator[Answer, None]:
    from tlt_sglang.engine import engine

    state, answers = manager.rid_to_state[obj.rid], original(manager, obj, *args)
    return engine.require().answers.stream(answers, manager, obj, state)


PATCHES = (send_one_request, wait_one_response)
