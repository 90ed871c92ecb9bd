"""Which models an update of the weights reaches, and a session for clients that open none.

SGLang's selector is "all" where a client names no other, and loads the target's tensors into the
drafter, too. An EAGLE drafter has a checkpoint of its own, with tensors of the same names: here
"all" means the target for it. Prediction heads are part of the target's checkpoint, and "all" stays
what it is.

SGLang takes tensors only between begin_weight_update and end_weight_update. Clients that were
written for an older one send neither, so `WeightSync` opens and closes a session around each of
their updates.

Runs in the scheduler process, on every rank, which all take the same decisions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tlt_sglang import upstream

if TYPE_CHECKING:
    from tlt_sglang.config.settings import OlderClients
    from tlt_sglang.upstream.weight_updates import (
        UpdatedRunner,
        UpdateManager,
        UpdateRequest,
        UpdateResult,
    )

logger = logging.getLogger(__name__)

SESSION_OPENED = "TLT opened a weight-update session for this update."
"""Added to the answer, which thereby tells the main process that its client is an older one."""
_HEADS = ("nextn", "mtp")
"""Parts of the class names of prediction heads in SGLang."""


class WeightSync:
    """The updates of the weights in one scheduler."""

    def __init__(self) -> None:
        self.opened_sessions = 0
        """Updates for which a session was opened here."""
        self._narrowed = False
        """True if the open session was begun for "all" and covers the target alone."""

    def status(self, manager: UpdateManager) -> dict[str, object]:
        """Return this part of `GET /tlt/status`."""
        sglang = upstream.current()
        session = sglang.update_session(manager)
        return {
            "session": None if session is None else session.selector,
            "opened_sessions": self.opened_sessions,
            "process_groups": sglang.update_groups(manager.tp_worker.model_runner),
            "released": sorted(manager.offload_tags),
            "separate_drafter": has_separate_drafter(manager),
        }

    # -- which models ----------------------------------------------------------------------------

    def default_selector(self, manager: UpdateManager) -> str:
        """Return the meaning of "all": "target" where the drafter has its own checkpoint."""
        return "target" if has_separate_drafter(manager) else "all"

    def narrow(self, manager: UpdateManager, request: UpdateRequest) -> bool:
        """Keep a separate drafter out of a request for "all"; return whether that was necessary."""
        if request.selector != "all" or not has_separate_drafter(manager):
            return False
        request.selector = "target"
        return True

    def update_target(
        self,
        original: Callable[[UpdateRequest], UpdateResult],
        manager: UpdateManager,
        request: UpdateRequest,
    ) -> UpdateResult:
        """Update as SGLang does where it knows neither selectors nor sessions, but for a separate
        drafter, which SGLang would load first."""
        drafter = manager.draft_worker
        if not has_separate_drafter(manager):
            return original(request)
        manager.draft_worker = None
        try:
            return original(request)
        finally:
            manager.draft_worker = drafter

    # -- sessions --------------------------------------------------------------------------------

    def begin(
        self,
        original: Callable[[UpdateRequest], UpdateResult],
        manager: UpdateManager,
        request: UpdateRequest,
    ) -> UpdateResult:
        """Open a session as SGLang does, for the target alone where "all" means that."""
        narrowed = self.narrow(manager, request)
        result = original(request)
        if result.success:
            self._narrowed = narrowed
        return result

    def update(
        self,
        original: Callable[[UpdateRequest], UpdateResult],
        manager: UpdateManager,
        request: UpdateRequest,
        older_clients: OlderClients,
    ) -> UpdateResult:
        """Load tensors with SGLang's `original`, in a session of their own if none is open.

        With "off" for `older_clients`, an update without a session is left to SGLang, which
        refuses it.
        """
        self.narrow(manager, request)
        if manager._session is not None:
            self._widen(manager, request)
            return original(request)
        if older_clients == "off":
            return original(request)
        return self.in_session(lambda: original(request), manager, request.selector)

    def in_session(
        self, load: Callable[[], UpdateResult], manager: UpdateManager, selector: str
    ) -> UpdateResult:
        """Load between the beginning and the end of a session; return the result of `load`."""
        from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput, EndWeightUpdateReqInput

        manager.begin_weight_update(BeginWeightUpdateReqInput(selector=selector))
        try:
            result = load()
        finally:
            manager.end_weight_update(EndWeightUpdateReqInput())
        result.message = f"{result.message} {SESSION_OPENED}"
        if not self.opened_sessions:
            logger.info(
                "A client updates weights without begin_weight_update, as clients of an older "
                "SGLang do; a session is opened for each of its updates."
            )
        self.opened_sessions += 1
        return result

    def _widen(self, manager: UpdateManager, request: UpdateRequest) -> None:
        """Include the drafter in a session for "all", once a client names the drafter in it."""
        from sglang.srt.managers.scheduler_components.weight_updater import _WeightUpdateSession

        if request.selector != "draft" or not self._narrowed:
            return
        for _, runner in manager._select_runners("draft"):
            runner.weight_updater.begin_weight_update()
        # The load that follows would note `loaded_weights` by itself.
        manager._session = _WeightUpdateSession(selector="all", loaded_weights=True)
        self._narrowed = False


def limited(options: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """Return the options of a trainer's process group, with a time limit of `timeout` seconds.

    NCCL's own limit ends the process, so only gloo's is set.
    """
    if timeout is None or options.get("backend") != "gloo":
        return options
    return options | {"timeout": timedelta(seconds=timeout)}


def has_separate_drafter(manager: UpdateManager) -> bool:
    """Return whether the drafter has a checkpoint of its own, which a target's has no part in."""
    if manager.draft_worker is None:
        return False
    runners = upstream.current().draft_runners(manager.draft_worker)
    return bool(runners) and not any(map(_is_part_of_target, runners))


def _is_part_of_target(runner: UpdatedRunner) -> bool:
    """Return whether a drafter was loaded from the target's checkpoint, or from a part of it."""
    path, name = runner.server_args.speculative_draft_model_path, type(runner.model).__name__
    same = path is None or path == runner.server_args.model_path
    return same or any(mark in name.lower() for mark in _HEADS)
