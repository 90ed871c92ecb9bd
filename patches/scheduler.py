"""sglang.srt.managers.scheduler, in the scheduler process: attaches the engine and its commands."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import (
        InternalState,
        InternalStateRequest,
        Scheduler,
        Upstream,
    )
    from tlt_sglang.upstream.scheduled import ArrivedRequest, IntakeScheduler

_MODULE = "sglang.srt.managers.scheduler"


@wraps_upstream(
    f"{_MODULE}:Scheduler.__init__",
    why="the last moment to check that every patch is in; and our own errors need no traceback",
    remove_when="SGLang has a hook that runs when a scheduler is built",
    process="scheduler",
)
def init(original: Upstream, scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
    from tlt_sglang.cpu import ranks
    from tlt_sglang.engine import engine
    from tlt_sglang.errors import TltError, end_process

    server_args = args[0] if args else kwargs["server_args"]
    if engine.require().device == "cpu":
        ranks.begin(server_args)
    engine.require().begin_scheduler(server_args.random_seed)
    try:
        original(scheduler, *args, **kwargs)
        engine.require().attach(scheduler)
    except TltError as error:
        end_process(error)


@wraps_upstream(
    f"{_MODULE}:Scheduler.get_internal_state",
    why="carries the scheduler's part of GET /tlt/status to the HTTP process",
    remove_when="plugins can contribute to SGLang's internal state",
    process="scheduler",
)
def get_internal_state(original: Upstream, scheduler: Scheduler, request: object) -> InternalState:
    from tlt_sglang.engine import engine

    state: InternalState = original(scheduler, request)
    state.internal_state["tlt"] = engine.require().status()
    return state


@wraps_upstream(
    f"{_MODULE}:Scheduler.set_internal_state",
    why="carries the commands of POST /tlt/... to every scheduler, between two steps",
    remove_when="plugins can add to SGLang's internal state",
    process="scheduler",
)
def set_internal_state(
    original: Upstream, scheduler: Scheduler, recv_req: InternalStateRequest
) -> object:
    from tlt_sglang import upstream
    from tlt_sglang.engine import engine
    from tlt_sglang.engine.admin import COMMAND_KEY

    command = recv_req.server_args.get(COMMAND_KEY)
    if command is None:
        return original(scheduler, recv_req)
    return upstream.current().acted(engine.require().act(command))


@wraps_upstream(
    f"{_MODULE}:Scheduler.on_idle",
    why="the end of requests is logged, and a drafter version swapped in, without waiting for work",
    remove_when="SGLang tells plugins when the scheduler is idle",
    process="scheduler",
)
def on_idle(original: Upstream, scheduler: Scheduler) -> None:
    from tlt_sglang.engine import engine

    online_drafter = engine.require().step.online_drafter
    if online_drafter is not None:
        online_drafter.idle()
    original(scheduler)


@wraps_upstream(
    f"{_MODULE}:Scheduler.process_input_requests",
    why="a request that raises before it is received ended the engine",
    remove_when="SGLang aborts a request that raises while it is received",
    process="scheduler",
)
def process_input_requests(
    original: Upstream, scheduler: IntakeScheduler, recv_reqs: Sequence[object]
) -> None:
    from tlt_sglang.engine import shield

    shield.process(functools.partial(original, scheduler), scheduler, recv_reqs)


@wraps_upstream(
    f"{_MODULE}:Scheduler.handle_generate_request",
    why="a request that raises while it is received ended the engine",
    remove_when="SGLang aborts a request that raises while it is received",
    process="scheduler",
)
def handle_generate_request(
    original: Upstream, scheduler: IntakeScheduler, recv_req: ArrivedRequest, **options: Any
) -> None:
    from tlt_sglang.engine import shield

    shield.receive(original, scheduler, recv_req, **options)


PATCHES = (
    init,
    get_internal_state,
    set_internal_state,
    on_idle,
    process_input_requests,
    handle_generate_request,
)
