"""SGLang's objects behind an update of the weights, as far as the product relies on them.

Like `protocols`, this is also the list of attributes that an upgrade of SGLang has to check. It is
imported for type checks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from tlt_sglang.upstream.protocols import ServerArgs


class UpdateRequest(Protocol):
    """A request of `sglang.srt.managers.io_struct` that names the models that it is for."""

    selector: str
    """"target", "draft", or "all", which is the default."""


class UpdateResult(Protocol):
    """An answer of `sglang.srt.managers.io_struct` to a command."""

    success: bool
    message: str


class UpdateSession(Protocol):
    """`_WeightUpdateSession`: what begin_weight_update has opened."""

    selector: str


class RunnerUpdater(Protocol):
    """`WeightUpdater` of one model runner."""

    def begin_weight_update(self) -> None:
        """Make the model's weights loadable."""


class UpdatedRunner(Protocol):
    """`ModelRunner`, whose weights are updated."""

    model: torch.nn.Module
    server_args: ServerArgs
    weight_updater: RunnerUpdater


class UpdatedWorker(Protocol):
    """`TpModelWorker` or a speculative worker."""

    def weight_update_runners(self) -> Sequence[tuple[str, UpdatedRunner]]:
        """Return the models that the worker runs, each with its role."""


class UpdateManager(Protocol):
    """`SchedulerWeightUpdaterManager` of a scheduler."""

    draft_worker: UpdatedWorker | None
    _session: UpdateSession | None

    def _select_runners(self, selector: str = "all") -> Sequence[tuple[str, UpdatedRunner]]:
        """Return the models that a selector names."""

    def begin_weight_update(self, recv_req: object) -> UpdateResult:
        """Open a session."""

    def end_weight_update(self, recv_req: object) -> UpdateResult:
        """Close the session."""
