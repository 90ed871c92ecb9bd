"""SGLang's objects behind an update of the weights, as far as the product relies on them.

Like `protocols`, this is also the list of attributes that an upgrade of SGLang has to check. It is
imported for type checks only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

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

    _model_update_group: Mapping[str, object]
    """The process groups that trainers have formed with it, by name."""

    def begin_weight_update(self) -> None:
        """Make the model's weights loadable."""


class UpdatedRunner(Protocol):
    """`ModelRunner`, whose weights are updated."""

    model: torch.nn.Module
    server_args: ServerArgs
    weight_updater: RunnerUpdater


class UpdatedWorker(Protocol):
    """`TpModelWorker` or a speculative worker."""

    model_runner: UpdatedRunner

    def weight_update_runners(self) -> Sequence[tuple[str, UpdatedRunner]]:
        """Return the models that the worker runs, each with its role."""


class UpdateManager(Protocol):
    """`SchedulerWeightUpdaterManager` of a scheduler."""

    tp_worker: UpdatedWorker
    draft_worker: UpdatedWorker | None
    offload_tags: Collection[str]
    """The kinds of memory that are released at present."""
    _session: UpdateSession | None
    """Not None between begin_weight_update and end_weight_update."""

    def _select_runners(self, selector: str = "all") -> Sequence[tuple[str, UpdatedRunner]]:
        """Return the models that a selector names."""

    def begin_weight_update(self, recv_req: object) -> UpdateResult:
        """Open a session."""

    def end_weight_update(self, recv_req: object) -> UpdateResult:
        """Close the session."""


class ControlledManager(Protocol):
    """`sglang.srt.managers.tokenizer_manager.TokenizerManager`, as trainers control it."""

    is_pause: bool

    async def get_internal_state(self) -> list[dict[str, Any]]:
        """Return the internal state of every scheduler."""

    async def continue_generation(self, obj: object) -> None:
        """End a pause."""

    async def end_weight_update(self, obj: object) -> tuple[bool, str]:
        """Close the session of every scheduler; return success and a message."""

    async def destroy_weights_update_group(self, obj: object) -> tuple[bool, str]:
        """Leave a process group; return success and a message."""
