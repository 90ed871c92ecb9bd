"""The Protocol of what differs between the shapes of SGLang.

An adapter says where a thing stands in SGLang; it has no state, and decides nothing. A method is
here only if two shapes differ in it. Runs in the main and scheduler processes.

Shapes: B requests, T tokens, D draft vocabulary, N hidden size, L captured layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import DecoderModel, LogitsProcessor
    from tlt_sglang.upstream.protocols import (
        DraftWorker,
        LogitsOutput,
        SpecSettings,
        StepResult,
        Upstream,
    )
    from tlt_sglang.upstream.scheduled import ArrivedRequest, IntakeScheduler
    from tlt_sglang.upstream.weight_updates import UpdateManager


class Sglang(Protocol):
    """The installed SGLang, as `tlt_sglang.upstream.current` returns it."""

    def limits(self) -> Sequence[str]:
        """Return what this shape lacks of the newest one, a sentence each."""

    # -- settings of the engine --------------------------------------------------------------------

    def is_resolved(self, server_args: Any) -> bool:
        """Return whether SGLang has computed its arguments, so that changes come too late."""

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

    def sample_proposal(
        self,
        sample: Upstream,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_ks: torch.Tensor,
        seeds: torch.Tensor | None,
        positions: torch.Tensor,
        step: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample a draft for each row of a drafter's `logits` [B, D], the most likely where the
        `top_ks` [B] are 1. `temperatures` are [B, 1]; `sample` is SGLang's `sample_draft_proposal`,
        patched or not.

        `seeds` [B] make it a function of the `positions` [B] and the `step` of the draft, in shapes
        that know seeds under speculation. Returns the distribution [B, D], and the draft's
        probability and index, each [B, 1].
        """

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

    # -- requests, models and weights --------------------------------------------------------------

    def send_abort(
        self, scheduler: IntakeScheduler, abort: object, request: ArrivedRequest
    ) -> None:
        """Report a request that has ended outside of a batch."""

    def has_input_norm(self, model: DecoderModel) -> bool:
        """Return whether an EAGLE-3 drafter normalises its features before its first layer."""

    def updates_weights(self, updater: UpdateManager) -> bool:
        """Return whether an update of weights has begun and not ended."""
