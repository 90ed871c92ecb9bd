"""sglang.srt.managers.tokenizer_manager, in the main process: the seed of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.requests import (
        Answer,
        Manager,
        Request,
        RequestState,
        TokenizedRequest,
    )

_MANAGER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"


@wraps_upstream(
    f"{_MANAGER}._send_one_request",
    why="all samples of a request with a seed were the same text",
    remove_when="SGLang gives each sample of a request a seed of its own",
    process="main",
)
async def send_one_request(
    original: Upstream, manager: Manager, tokenized_obj: TokenizedRequest
) -> None:
    from tlt_sglang.engine import engine

    await original(manager, tokenized_obj)
    engine.require().answers.sent(manager, tokenized_obj)


@wraps_upstream(
    f"{_MANAGER}._stream_one_response",
    why="the seed of an answer is not reported, and answers are not logged for a replay",
    remove_when="SGLang reports the seed of each answer in its meta_info",
    process="main",
)
def stream_one_response(
    original: Upstream,
    manager: Manager,
    *,
    obj: Request,
    state: RequestState,
    **options: object,
) -> AsyncGenerator[Answer, None]:
    from tlt_sglang.engine import engine

    answers = original(manager, obj=obj, state=state, **options)
    return engine.require().answers.stream(answers, manager, obj, state)


@wraps_upstream(
    f"{_MANAGER}._set_engine_state_field",
    why="an engine whose client has died while it was paused does not say what it waits for",
    remove_when="SGLang says what it waits for, and ends a pause that nobody ends",
    process="main",
)
def set_engine_state_field(original: Upstream, manager: Any, name: str, value: object) -> None:
    from tlt_sglang.engine import engine

    tlt = engine.require()
    if name == "_is_pause":
        tlt.clients.paused(manager, bool(value), tlt.config.client_timeout_s)
    original(manager, name, value)


PATCHES = (send_one_request, stream_one_response, set_engine_state_field)
