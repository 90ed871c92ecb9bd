"""SGLang's requests and batches as the scheduler's last line of defence sees them.

Like `protocols`, this is also the list of attributes that an upgrade of SGLang has to check. It is
imported for type checks only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Processor = Callable[[torch.Tensor, Sequence[Mapping[str, object] | None]], object]
"""`sglang.srt.sampling.custom_logit_processor.CustomLogitProcessor`."""


class SessionParams(Protocol):
    """`sglang.srt.managers.io_struct.SessionParams`."""

    id: str | None


class ArrivedRequest(Protocol):
    """`sglang.srt.managers.io_struct.TokenizedGenerateReqInput`."""

    rid: str
    session_params: SessionParams | None


class SamplingParams(Protocol):
    """`sglang.srt.sampling.sampling_params.SamplingParams`."""

    min_new_tokens: int
    sampling_seed: int | None


class ScheduledRequest(Protocol):
    """`sglang.srt.managers.schedule_batch.Req`."""

    rid: str
    tokenizer: object | None
    output_ids: Sequence[int]
    sampling_params: SamplingParams
    custom_logit_processor: str | None
    grammar: object | None
    to_finish: Any
    finished_reason: Any


class Session(Protocol):
    """`sglang.srt.session.session_controller.Session`."""

    streaming: bool

    def abort_req(self) -> None:
        """Note that the request in flight has ended."""


class SessionController(Protocol):
    """`sglang.srt.session.session_controller.SessionController`."""

    def get(self, session_id: str) -> Session | None:
        """Return an open session."""


class GrammarManager(Protocol):
    """`sglang.srt.constrained.grammar_manager.GrammarManager`."""

    grammar_queue: list[ScheduledRequest]


class IntakeScheduler(Protocol):
    """`sglang.srt.managers.scheduler.Scheduler`, while it receives requests."""

    waiting_queue: list[ScheduledRequest]
    grammar_manager: GrammarManager
    session_controller: SessionController
    ipc_channels: Any
    """Sockets to the other processes."""

    def _tokenized_requests(self, received: object) -> Sequence[ArrivedRequest]:
        """Return the requests in what has arrived, which may be a command."""

    def send_abort_output(self, abort_req: object, req: ArrivedRequest) -> None:
        """Report a request that has ended outside of a batch."""


class ScheduledBatch(Protocol):
    """`sglang.srt.managers.schedule_batch.ScheduleBatch`."""

    reqs: Sequence[ScheduledRequest]
    device: str


class ProcessorEntry(Protocol):
    """`sglang.srt.sampling.sampling_batch_info.ProcessorEntry`."""

    processor: Any
    rows: Sequence[int]


class ProcessedSampling(Protocol):
    """`sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo`."""

    custom_logit_processor: Mapping[int, ProcessorEntry] | None
    custom_params: Any
    sampling_seed: torch.Tensor | None
