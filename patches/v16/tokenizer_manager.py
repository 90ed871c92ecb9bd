"""sglang.srt.managers.tokenizer_manager, in the main process: seeds of answers, pauses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import Patch, wraps_upstream

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


def _wrapped(name: str) -> Callable[[Upstream], Patch]:
    return wraps_upstream(
        f"{_MANAGER}.{name}",
        why="an engine whose client has died while it was paused does not say what it waits for",
        remove_when="SGLang says what it waits for, and ends a pause that nobody ends",
        process="main",
    )


def _note(manager: Any, paused: bool) -> None:
    from tlt_sglang.engine import engine

    tlt = engine.require()
    tlt.clients.paused(manager, paused, tlt.config.client_timeout_s)


@_wrapped("init_weight_update")
def init_weight_update(original: Upstream, manager: Any) -> None:
    _note(manager, False)
    original(manager)


@_wrapped("pause_generation")
async def pause_generation(original: Upstream, manager: Any, obj: object) -> None:
    _note(manager, True)
    await original(manager, obj)


@_wrapped("continue_generation")
async def continue_generation(original: Upstream, manager: Any, obj: object) -> None:
    await original(manager, obj)
    _note(manager, False)


PATCHES = (
    send_one_request,
    wait_one_response,
    init_weight_update,
    pause_generation,
    continue_generation,
)
