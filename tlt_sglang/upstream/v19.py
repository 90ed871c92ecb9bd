"""The shape of SGLang whose settings are a dataclass, resolved by a call of their own.

Weights have no sessions: an update is one call, which loads the target's weights into the drafter,
too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import arguments, v22

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.results import DecodeResult
    from tlt_sglang.upstream.weight_updates import UpdatedRunner, UpdatedWorker, UpdateManager

LIMITS = (
    "Where the KV pool is short, this SGLang retracts requests earlier with speculation than "
    "without.",
    "This SGLang answers a refused stream of /generate with status 200, and the error in it.",
    "Updates of the weights have no sessions and no selectors with this SGLang: they reach the "
    "target alone, and nothing but a hot swap changes a separate drafter.",
)


class Adapter(v22.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def limits(self) -> Sequence[str]:
        return (*super().limits(), *LIMITS)

    # -- settings of the engine --------------------------------------------------------------------

    def resolve_again(self, server_args: Any) -> bool:
        fields = [field.name for field in dataclasses.fields(server_args)]
        return arguments.resolve_again(server_args, fields, object.__setattr__)

    # -- drafting ----------------------------------------------------------------------------------

    def _draft_placement(self, draft: Any) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = draft.draft_tp_context(
            draft.draft_runner.tp_group
        )
        return context

    def processors(self, info: Any) -> list[tuple[int, Any, Sequence[int]]]:
        entries = (info.custom_logit_processor or {}).items()
        return [
            (key, processor, mask.nonzero()[:, 0].tolist()) for key, (processor, mask) in entries
        ]

    def set_processor(self, info: Any, key: int, processor: object) -> None:
        _, mask = info.custom_logit_processor[key]
        info.custom_logit_processor[key] = processor, mask

    def asks_for_masks(self, info: Any) -> bool:
        return any(info.return_sampling_masks or ())

    def sampled(self, tokens: torch.Tensor) -> object:
        return tokens

    # -- outputs of the target ---------------------------------------------------------------------

    def model_output(self, hidden: torch.Tensor, captured: torch.Tensor) -> object:
        return hidden, [captured.flatten(1)]

    def non_draft_tokens(self, result: DecodeResult) -> int:
        return 1

    def request_values(self) -> list[int]:
        return _Unsent()

    # -- requests, models and weights --------------------------------------------------------------

    def drop_unused(self, manager: Any, call: Any) -> None:
        # There is one for each sample, but samples get states of their own, and SGLang forgets all
        # but the first: it would wait for the others when it is to end.
        for request_id in call.rid[call.batch_size :]:
            manager.rid_to_state.pop(request_id, None)

    def draft_runners(self, worker: UpdatedWorker) -> Sequence[UpdatedRunner]:
        drafter = getattr(worker, "_draft_worker", None)
        return [] if drafter is None else [drafter.draft_runner]

    def update_session(self, updater: UpdateManager) -> None:
        return None  # an update is one call


class _Unsent(list[int]):
    """Values of a request, of which SGLang takes a slice by tokens with each part of an answer.

    A slice is what no earlier one had.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sent = 0

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return super().__getitem__(key)
        sent, self._sent = self._sent, len(self)
        return super().__getitem__(slice(sent, None))
