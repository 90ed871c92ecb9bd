"""sglang.srt.managers.communicator, in the main process: what trainers ask of schedulers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.communicator:FanOutCommunicator.__call__",
    why="an engine whose client has died in a session or a process group does not say what it "
    "waits for",
    remove_when="SGLang says what it waits for, and ends what nobody ends",
    process="main",
)
async def call(original: Upstream, communicator: object, obj: object) -> object:
    from tlt_sglang.engine import engine

    tlt, send = engine.require(), functools.partial(original, communicator)
    return await tlt.clients.call(send, obj, tlt.config.client_timeout_s)


PATCHES = (call,)
