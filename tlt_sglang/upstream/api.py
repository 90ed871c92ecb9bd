"""The Protocol of what differs between the shapes of SGLang.

An adapter says where a thing stands in SGLang; it has no state, and decides nothing. A method is
here only if two shapes differ in it. Runs in the main and scheduler processes.

Shapes: B requests, T tokens, D draft vocabulary, N hidden size, L captured layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import DecoderModel, GrammarMask, LogitsProcessor
    from tlt_sglang.upstream.protocols import (
        Batch,
        DraftWorker,
        LogitsOutput,
        ModelRunner,
        SamplingInfo,
        SpecSettings,
        StepResult,
        TokenizerManager,
        VerifyInput,
    )
    from tlt_sglang.upstream.requests import Manager
    from tlt_sglang.upstream.results import AnsweredRequest, DecodeResult
    from tlt_sglang.upstream.scheduled import ArrivedRequest, IntakeScheduler
    from tlt_sglang.upstream.weight_updates import (
        UpdatedRunner,
        UpdatedWorker,
        UpdateManager,
        UpdateSession,
    )


class Sglang(Protocol):
    """The installed SGLang, as `tlt_sglang.upstream.current` returns it."""

    def limits(self) -> Sequence[str]:
        """Return what this shape lacks of the newest one, a sentence each."""

    # -- settings of the engine --------------------------------------------------------------------

    def is_resolved(self, server_args: Any) -> bool:
        """Return whether SGLang has computed its arguments, so that changes come too late."""

    def mark(self, server_args: Any) -> None:
        """Note that arguments have our fields, for processes that do not load plugins."""

    def resolve_again(self, server_args: Any) -> bool:
        """Resolve arguments once more from what the operator asked for; return whether that is
        possible."""

    def spec(self) -> SpecSettings:
        """Return the settings of speculation."""

    def with_spec(self, **settings: object) -> AbstractContextManager[object]:
        """Return a context in which settings of speculation have other values."""

    def captured_sizes(self) -> Sequence[int] | None:
        """Return the batch sizes whose decode steps are captured as graphs; None without graphs."""

    def with_captured_sizes(self, sizes: list[int] | None) -> AbstractContextManager[object]:
        """Return a context in which decode steps of other batch sizes are captured.

        An empty list captures none; None changes nothing.
        """

    def page_size(self) -> int:
        """Return the tokens of a page of the KV cache."""

    def is_deterministic(self) -> bool:
        """Return whether `--enable-deterministic-inference` is on."""

    def has_metrics(self) -> bool:
        """Return whether `--enable-metrics` is on."""

    def returns_hidden_states(self) -> bool:
        """Return whether requests may ask for hidden states."""

    def serve_app(self, name: str) -> None:
        """Have several HTTP processes import the app to serve by `name` ("package.module:app")."""

    # -- drafting ----------------------------------------------------------------------------------

    def draft_contexts(self, draft: DraftWorker) -> AbstractContextManager[object]:
        """Return the contexts in which SGLang builds and runs its drafter."""

    def slots_per_step(self) -> int:
        """Return the KV slots that a step of the present settings writes for each request."""

    def chain_to_verify(
        self, draft: DraftWorker, batch: Batch, drafts: torch.Tensor
    ) -> VerifyInput:
        """Return the verify input of a chain of `drafts` [B, depth], as deep as the drafter's."""

    def extend_batch(self, batch: Batch, runner: ModelRunner) -> Any:
        """Return the forward batch in which a drafter extends `batch`, and keeps the hidden state
        of each request's last token."""

    def decode_graph_runner(self, runner: ModelRunner) -> Callable[..., object]:
        """Return the class of the graphs of a target's decode steps."""

    def processors(self, info: Any) -> list[tuple[int, Any, Sequence[int]]]:
        """Return the custom logit processors of a batch, each with its key and its requests."""

    def set_processor(self, info: Any, key: int, processor: object) -> None:
        """Replace a custom logit processor of a batch."""

    def asks_for_masks(self, info: SamplingInfo) -> bool:
        """Return whether a request of a batch asks for its sampling mask."""

    def sampled(self, tokens: torch.Tensor) -> object:
        """Return sampled tokens [B] as `Sampler._sample_from_probs` does."""

    def grammar_mask(self, verify_input: VerifyInput, mask: Any) -> GrammarMask | None:
        """Return what a verify step is given as its grammar mask as an object that applies it."""

    # -- outputs of the target ---------------------------------------------------------------------

    def model_output(self, hidden: torch.Tensor, captured: torch.Tensor) -> object:
        """Return what a target's model returns, of hidden states [T, N] and inputs [T, L, N] of the
        layers that its drafter reads."""

    def keep_last_hidden_states(self, processor: LogitsProcessor) -> None:
        """Have a target's logits processor keep the last hidden states of all its tokens."""

    def last_hidden_states(self, output: LogitsOutput) -> torch.Tensor | None:
        """Return the target's last hidden states [T, N] if they are kept beside the features."""

    def accept_index(self, result: StepResult) -> torch.Tensor | None:
        """Return the rows of the accepted tokens in the last hidden states [B, depth]; None if they
        are the first ones of each request, and after a prefill."""

    def non_draft_tokens(self, result: DecodeResult) -> int:
        """Return how many tokens of each accepted run the target chose without a draft."""

    def uncommit(self, request: AnsweredRequest, tokens: int) -> None:
        """Take back the last `tokens` of a request that were counted as committed."""

    def retain(self, result: DecodeResult, row: int, runs: list[list[int]]) -> None:
        """Note that of the accepted run of a row only `runs[row]` is committed."""

    def request_values(self) -> list[int]:
        """Return an empty list for values of a request that its meta_info reports once."""

    # -- requests, models and weights --------------------------------------------------------------

    def weight_version(self, manager: TokenizerManager) -> object:
        """Return the version of the target's weights that a trainer named last."""

    def truncates(self, manager: Manager) -> bool:
        """Return whether prompts that are too long are cut."""

    def drop_unused(self, manager: Any, call: Any) -> None:
        """Drop the states that a tokenizer manager makes for a call with several requests and
        never uses."""

    def tokenized_requests(self, scheduler: IntakeScheduler, received: Any) -> Sequence[Any]:
        """Return the requests in what has arrived, which may be a command."""

    def acted(self, updated: bool) -> object:
        """Return a scheduler's answer to a command."""

    def send_abort(
        self, scheduler: IntakeScheduler, abort: object, request: ArrivedRequest
    ) -> None:
        """Report a request that has ended outside of a batch."""

    def update_groups(self, runner: UpdatedRunner) -> Sequence[str]:
        """Return the names of the process groups that trainers have formed with a model runner."""

    def draft_runners(self, worker: UpdatedWorker) -> Sequence[UpdatedRunner]:
        """Return the model runners of a drafter; empty for n-grams."""

    def has_input_norm(self, model: DecoderModel) -> bool:
        """Return whether an EAGLE-3 drafter normalises its features before its first layer."""

    def update_session(self, updater: UpdateManager) -> UpdateSession | None:
        """Return the session of weight updates that has begun and not ended, if there is one."""
