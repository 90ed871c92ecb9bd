"""sglang.srt.managers.scheduler, in the scheduler process: attach the engine, tell its state."""

from __future__ import annotations

from typing import Any

from tlt_sglang.engine.admin import ORDER
from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.managers.scheduler"


@wraps_upstream(
    f"{_MODULE}:Scheduler.__init__",
    why="the last moment to see that every patch is in; and our own errors need no traceback",
    remove_when="SGLang has a hook for a scheduler that stands",
    process="scheduler",
    digests={"0.5.23": "d37b5301e9085079"},
)
def init(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    from tlt_sglang.cpu import ranks
    from tlt_sglang.engine import engine
    from tlt_sglang.errors import TltError, end_process

    assert engine.current is not None
    if engine.current.device == "cpu":
        ranks.begin(args[0] if args else kwargs["server_args"])
    try:
        original(scheduler, *args, **kwargs)
        engine.current.attach(scheduler)
    except TltError as error:
        end_process(error)


@wraps_upstream(
    f"{_MODULE}:Scheduler.get_internal_state",
    why="carries the scheduler's part of GET /tlt/status to the HTTP process",
    remove_when="plugins can contribute to SGLang's internal state",
    process="scheduler",
    digests={"0.5.23": "12f83db359aeb97d"},
)
def get_internal_state(original: Any, scheduler: Any, request: Any) -> Any:
    from tlt_sglang.engine import engine

    assert engine.current is not None
    answer = original(scheduler, request)
    answer.internal_state["tlt"] = engine.current.status()
    return answer


@wraps_upstream(
    f"{_MODULE}:Scheduler.set_internal_state",
    why="carries the orders of POST /tlt/... to every scheduler, between two steps",
    remove_when="plugins can add to SGLang's internal state",
    process="scheduler",
    digests={"0.5.23": "af788b2476e5e242"},
)
def set_internal_state(original: Any, scheduler: Any, recv_req: Any) -> Any:
    from tlt_sglang.engine import engine

    assert engine.current is not None
    order = recv_req.server_args.get(ORDER)
    if order is None:
        return original(scheduler, recv_req)
    from sglang.srt.managers.io_struct import SetInternalStateReqOutput

    return SetInternalStateReqOutput(updated=engine.current.act(order))


@wraps_upstream(
    f"{_MODULE}:Scheduler.on_idle",
    why="the end of requests is logged, and a drafter version is taken, without waiting for work",
    remove_when="SGLang tells plugins when the scheduler is idle",
    process="scheduler",
    digests={"0.5.23": "79d57d8c07182133"},
)
def on_idle(original: Any, scheduler: Any) -> None:
    from tlt_sglang.engine import engine

    assert engine.current is not None
    if engine.current.step.online_drafter is not None and scheduler.weight_updater._session is None:
        engine.current.step.online_drafter.idle()
    original(scheduler)


PATCHES = (init, get_internal_state, set_internal_state, on_idle)
