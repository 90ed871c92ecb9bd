"""The shape of SGLang before drafters had a parallel layout, and before their samples had seeds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import v23

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import LogitsProcessor
    from tlt_sglang.upstream.protocols import LogitsOutput, StepResult
    from tlt_sglang.upstream.scheduled import ArrivedRequest, IntakeScheduler


class Adapter(v23.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def limits(self) -> Sequence[str]:
        return (
            "With --tokenizer-worker-num greater than 1, this SGLang serves its own app: without "
            "TLT's routes, and without its checks of requests.",
        )

    def serve_app(self, name: str) -> None:
        pass

    def _draft_placement(self, draft: Any) -> AbstractContextManager[object]:
        from sglang.srt.speculative import eagle_worker_v2 as eagle

        context: AbstractContextManager[object] = eagle.draft_tp_context(draft.draft_owns_attention)
        return context

    def keep_last_hidden_states(self, processor: LogitsProcessor) -> None:
        # Patches append them to the features of a target, and take them off again.
        architectures = getattr(processor.config, "architectures", None) or ()
        processor.keep_last_hidden_states = not any("Eagle" in name for name in architectures)

    def last_hidden_states(self, output: LogitsOutput) -> torch.Tensor | None:
        last: torch.Tensor | None = getattr(output, "last_hidden_states", None)
        return last

    def accept_index(self, result: StepResult) -> None:
        return None

    def send_abort(
        self, scheduler: IntakeScheduler, abort: object, request: ArrivedRequest
    ) -> None:
        scheduler.ipc_channels.send_to_tokenizer.send_output(abort, request)
