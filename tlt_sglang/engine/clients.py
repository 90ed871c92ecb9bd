"""Know what a client has begun at this engine and not ended: a pause, a session, a call.

A trainer that dies between pause_generation and continue_generation leaves an engine that answers
nobody, and one that dies inside a weight-update session or a process group leaves an engine that
refuses the next trainer. `Clients` knows what the engine waits for, says so in the log, and can end
it: by command (`POST /tlt/free`), or once a client has been silent for `client_timeout_s`.

It also notices clients that were written for an older SGLang, by their calls.

Runs in the main process, and in each tokenizer worker. What is open in the scheduler, the scheduler
is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from tlt_sglang.engine.weight_sync import SESSION_OPENED

if TYPE_CHECKING:
    from tlt_sglang.config.settings import Config
    from tlt_sglang.upstream.weight_updates import ControlledManager, UpdateResult

logger = logging.getLogger(__name__)

CALLS = {
    "InitWeightsUpdateGroupReqInput": "/init_weights_update_group",
    "DestroyWeightsUpdateGroupReqInput": "/destroy_weights_update_group",
    "BeginWeightUpdateReqInput": "/begin_weight_update",
    "EndWeightUpdateReqInput": "/end_weight_update",
    "UpdateWeightsFromTensorReqInput": "/update_weights_from_tensor",
    "UpdateWeightsFromDistributedReqInput": "/update_weights_from_distributed",
    "UpdateWeightsFromIPCReqInput": "/update_weights_from_ipc",
    "ReleaseMemoryOccupationReqInput": "/release_memory_occupation",
    "ResumeMemoryOccupationReqInput": "/resume_memory_occupation",
}
"""Requests of a trainer to the scheduler, and their routes."""
KINDS = ("session", "groups", "pause")
"""The kinds of things that can be freed, in the order in which they are."""
TICK = 1.0
BUSY_SECONDS = 2.0
"""Time after which the scheduler is not asked any more while it carries out a call."""
FIRST_LOG_SECONDS = 60.0
LOG_FACTOR = 4.0
"""Ratio of the times after which the log names again what the engine waits for."""
FORMER_KEYS = {
    "spec_accept_token_num": "spec_num_correct_drafts",
    "spec_accepted_drafts": "spec_num_correct_drafts",
    "spec_draft_token_num": "spec_num_proposed_drafts",
    "spec_proposed_drafts": "spec_num_proposed_drafts",
    "spec_accept_histogram": "spec_correct_drafts_histogram",
}
"""Keys of `meta_info` in older versions of SGLang, and the present ones."""
GIVEN_BY_OLDER = "spec_accepted_drafts"
"""The key that an SGLang adds by itself which still serves older clients."""

Json = dict[str, object]


class Clients:
    """The clients of one engine, as one process of its HTTP server sees them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.older = False
        """True once a call has arrived that only clients for an older SGLang make."""
        self.manager: ControlledManager | None = None
        """SGLang's tokenizer manager of this process."""
        self._clock = clock
        self._paused: float | None = None
        self._in_flight: dict[str, float] = {}
        self._session = False
        self._last_call = clock()
        self._watch: asyncio.Task[None] | None = None

    # -- what SGLang's calls tell ----------------------------------------------------------------

    def paused(self, manager: ControlledManager, paused: bool, timeout: float | None) -> None:
        """Note that generation is paused or continues."""
        self.manager = manager
        self._last_call = self._clock()
        self._paused = self._last_call if paused else None
        if paused:
            self._begin_watch(timeout)

    async def call(
        self,
        send: Callable[[object], Awaitable[list[UpdateResult]]],
        request: object,
        timeout: float | None,
    ) -> list[UpdateResult]:
        """Send a control request to the schedulers; return their results."""
        route = CALLS.get(type(request).__name__)
        if route is None:
            return await send(request)
        forms = route == "/init_weights_update_group"
        if forms and timeout is not None and self.silent_seconds > timeout:
            await self._leave_group(getattr(request, "group_name", None))
        self._last_call = self._in_flight[route] = self._clock()
        self._begin_watch(timeout)
        try:
            results = await send(request)
        finally:
            self._in_flight.pop(route, None)
            self._last_call = self._clock()
        if route == "/begin_weight_update" and all(result.success for result in results):
            self._session = True
        elif route == "/end_weight_update":
            self._session = False
        if any(SESSION_OPENED in getattr(result, "message", "") for result in results):
            self.note_older()
        return results

    def note_older(self) -> None:
        """Note a call that only clients for an older SGLang make."""
        self.older = True

    def add_former_keys(self, meta_info: MutableMapping[str, Any], config: Config) -> None:
        """Add the keys that older clients read to an answer's `meta_info`, if there are any."""
        older = self.older or GIVEN_BY_OLDER in meta_info
        if config.older_clients == "on" or (config.older_clients == "auto" and older):
            names = FORMER_KEYS.items()
            meta_info.update((old, meta_info[new]) for old, new in names if new in meta_info)

    # -- what the engine waits for ---------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Return whether the scheduler carries out a call that may not end, and cannot answer."""
        return any(self._clock() - since > BUSY_SECONDS for since in self._in_flight.values())

    @property
    def silent_seconds(self) -> float:
        """Return the time since the last call of a trainer began or ended."""
        return self._clock() - self._last_call

    def waits_for(self) -> list[Json]:
        """Return what is open, as this process knows it: rows of `GET /tlt/status`."""
        now = self._clock()
        rows: list[Json] = []
        if self._paused is not None:
            seconds = round(now - self._paused, 1)
            rows.append({"what": "pause", "ends_with": "/continue_generation", "seconds": seconds})
        if self._session:
            rows.append({"what": "session", "ends_with": "/end_weight_update"})
        rows += [
            {"what": "call", "ends_with": f"the end of {route}", "seconds": round(now - since, 1)}
            for route, since in self._in_flight.items()
            if now - since > BUSY_SECONDS
        ]
        return rows

    def status(self) -> Json:
        """Return this part of `GET /tlt/status`."""
        return {"older": self.older, "waits_for": self.waits_for(), "reason": self.reason()}

    def reason(self) -> str | None:
        """Return in a sentence why the engine does not generate; None if it can."""
        rows = self.waits_for()
        if not rows:
            return None
        ends = " and ".join(str(row["ends_with"]) for row in rows)
        return (
            f"The engine waits for {ends}; its client's last call was {self.silent_seconds:.0f} s "
            "ago. If that client has gone, POST /tlt/free ends what it has left."
        )

    # -- freeing ---------------------------------------------------------------------------------

    async def free(self, kinds: Collection[str]) -> list[str]:
        """End what clients have left open, of `kinds`; return what that was.

        A session that ends so may have loaded a part of the weights only.
        """
        assert self.manager is not None
        updates = await self._updates()
        freed = []
        if "session" in kinds and updates.get("session") is not None:
            await self.manager.end_weight_update(_request("EndWeightUpdateReqInput"))
            self._session = False
            freed.append("session")
        groups = updates.get("process_groups")
        for name in groups if "groups" in kinds and isinstance(groups, list) else ():
            request = _request("DestroyWeightsUpdateGroupReqInput", group_name=name)
            await self.manager.destroy_weights_update_group(request)
            freed.append(f"group {name}")
        if "pause" in kinds and self.manager.is_pause:
            request = _request("ContinueGenerationReqInput", torch_empty_cache=False)
            await self.manager.continue_generation(request)
            freed.append("pause")
        if freed:
            logger.warning("Freed what a client has left open: %s.", ", ".join(freed))
        if "session" in freed:
            logger.warning(
                "The session ended halfway, so the weights may be those of two versions; send a "
                "whole update before you rely on an answer."
            )
        return freed

    async def _leave_group(self, name: str | None) -> None:
        """Leave a group of this name, whose trainer is silent, before another one is formed."""
        assert self.manager is not None
        groups = (await self._updates())["process_groups"]
        if isinstance(groups, list) and name in groups:
            request = _request("DestroyWeightsUpdateGroupReqInput", group_name=name)
            await self.manager.destroy_weights_update_group(request)
            logger.warning("Left the process group %s of a client that is silent.", name)

    async def _updates(self) -> Mapping[str, object]:
        """Return what the first scheduler says of weight updates in its status."""
        assert self.manager is not None
        states = await self.manager.get_internal_state()
        updates: Mapping[str, object] = states[0]["tlt"]["weight_updates"]
        return updates

    # -- watching --------------------------------------------------------------------------------

    def _begin_watch(self, timeout: float | None) -> None:
        """Watch what is open until nothing is; `timeout` ends it after so many silent seconds."""
        if self._watch is None or self._watch.done():
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                return  # the manager is being built
            self._watch = loop.create_task(self._watch_open(timeout))

    async def _watch_open(self, timeout: float | None) -> None:
        next_log = FIRST_LOG_SECONDS
        while self._paused is not None or self._session or self._in_flight:
            await asyncio.sleep(TICK)
            silent = self.silent_seconds
            if silent >= next_log:
                next_log = silent * LOG_FACTOR
                await self._log_reason()
            elif silent < FIRST_LOG_SECONDS:
                next_log = FIRST_LOG_SECONDS
            if timeout is not None and silent >= timeout and not self._in_flight:
                await self._time_out(silent)

    async def _log_reason(self) -> None:
        if self._session and not self._in_flight:
            # Of several tokenizer workers, another one may have ended it.
            self._session = (await self._updates()).get("session") is not None
        if reason := self.reason():
            logger.warning(reason)

    async def _time_out(self, silent: float) -> None:
        """End what a silent client has left, unless it has released the engine's memory: an engine
        without weights or KV cache waits for the end of training.

        Nor where the scheduler answers late, or a call has come meanwhile: then a client is there.
        Of calls that are not `CALLS`, such as an update from disk, only that is known.
        """
        began = self._clock()
        updates = await self._updates()
        late = self._clock() - began > BUSY_SECONDS
        if updates.get("released") or late or self._in_flight or self._last_call > began:
            self._last_call = self._clock()
            return
        logger.warning(
            "No call of a client for %.0f s (--tlt-client-timeout-s), so what it has left open is "
            "ended.",
            silent,
        )
        await self.free(KINDS)
        self._session = False


def _request(name: str, **fields: object) -> object:
    """Return a request of SGLang's io_struct."""
    from sglang.srt.managers import io_struct

    return getattr(io_struct, name)(**fields)
