"""One speculation step, as SGLang's EAGLE worker makes it, and our part in each of its calls.

A decode step makes these calls, in this order; each is one patch of `eagle_worker_v2`:

    choose         take a new drafter version, choose the strategy and switch to it
    draft          propose tokens: the drafter's, those of n-gram matches, or none
    (verify)       SGLang's own
    draft_extend   log hidden states, let the drafter see what was committed, or defer that
    verified       note how many drafts were accepted, possibly a step or two later

A prefill makes `prefill_target` and, inside it, `prefill`. docs/internals/speculation-step.md draws
the sequence. Every engine process with an EAGLE worker has one `SpeculationStep`; what only some
configurations need is a part that may be None: `pool`, `noise`, `online_drafter`.

Runs in the scheduler process.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tlt_sglang.engine.accept_watch import AcceptWatch
from tlt_sglang.engine.driver import IN_FLIGHT
from tlt_sglang.engine.kv_slots import KvSlots
from tlt_sglang.sampling.sampled import sampled_rows

if TYPE_CHECKING:
    from tlt_sglang.engine.online_drafter import OnlineDrafter
    from tlt_sglang.engine.pool import Pool
    from tlt_sglang.engine.telemetry import Telemetry
    from tlt_sglang.sampling.draft_noise import DraftNoise
    from tlt_sglang.strategy.strategies import Strategy
    from tlt_sglang.upstream.protocols import Batch, Request, StepResult, Upstream, VerifyInput

logger = logging.getLogger(__name__)


@dataclass
class SpeculationStep:
    """The decode steps of one engine."""

    telemetry: Telemetry | None = None
    """Counts of every strategy; made when the strategies are known."""
    pool: Pool | None = None
    """Present where there are several strategies."""
    noise: DraftNoise | None = None
    """Present on CUDA where SGLang's drafter chooses with the target's noise."""
    online_drafter: OnlineDrafter | None = None
    """Present where there is a store of drafter versions."""
    slots: KvSlots = field(default_factory=KvSlots)
    """The KV slots for drafts, which may be short."""
    accept_watch: AcceptWatch = field(default_factory=AcceptWatch)
    """The accept length before and after updates of the weights."""
    cut: Collection[int] = ()
    """The requests whose drafts the verification of this step has cut, whoever drafted."""
    _open: deque[tuple[list[Request], Collection[int]]] = field(
        default_factory=lambda: deque(maxlen=IN_FLIGHT), repr=False
    )
    """The requests of the steps whose accepted drafts are not known yet, and those of them that had
    their drafts cut."""

    def choose(self, batch: Batch) -> None:
        """Begin the decode step of `batch`: take a new drafter version, choose the strategy."""
        if self.online_drafter is not None:
            self.online_drafter.swap_in()
        if self.pool is not None:
            self.pool.choose(batch, self.slots.short)

    def draft(
        self, original: Callable[[Batch], VerifyInput], batch: Batch, topk: int
    ) -> VerifyInput:
        """Return what is to be verified; `original` runs SGLang's drafter with `topk` branches."""
        if self.noise is not None:
            original = functools.partial(self.noise.draft, original)
        if self.pool is not None:
            return self.pool.draft(original, batch)
        return original(batch)

    def draft_extend(self, original: Callable[[], None], batch: Batch, result: StepResult) -> None:
        """Follow a verified step: log its hidden states and fill `result.next_draft_input`."""
        self._open.append((list(batch.reqs), self.cut))
        self.cut = ()
        if self.online_drafter is not None:
            self.online_drafter.log_verify_step(batch, result)

        def sampled() -> None:
            if self.noise is None:
                original()
            else:
                self.noise.draft_extend(original, batch, result)

        if self.pool is None:
            sampled()
        else:
            self.pool.draft_extend(sampled, batch, result)

    def prefill(self, original: Upstream, batch: Batch) -> object:
        """Run the drafter's own prefill, and return SGLang's next draft input."""

        def sampled() -> object:
            return original() if self.noise is None else self.noise.prefill(original, batch)

        return sampled() if self.pool is None else self.pool.prefill(sampled, batch)

    def prefill_target(self, original: Upstream, batch: Batch) -> object:
        """Run a whole prefill, and log the target's hidden states; return SGLang's result."""
        online = self.online_drafter
        if online is not None:
            online.swap_in()  # on idle ranks, too: all of them count the same steps
        if online is None or batch.forward_mode.is_idle():
            return original()
        # The drafter's own prefill moves the tokens by one.
        tokens, starts, counts = batch.input_ids, list(batch.prefix_lens), list(batch.extend_lens)
        result = original()
        online.log_prefill(batch, tokens, starts, counts, result.logits_output)
        return result

    def verified(self, accepted: Sequence[int]) -> None:
        """Note the drafts accepted per request in a step that is complete, without the bonus
        token. With overlap scheduling the next step has begun by then.

        What a step has computed of requests that the step before has ended does not count.
        """
        requests, cut = self._open.popleft() if self._open else ([], ())
        rows = [row for row, one in enumerate(requests) if not (one.finished() or one.is_retracted)]
        kept = None if len(rows) == len(requests) else rows
        if kept is not None:
            requests, accepted = [requests[row] for row in kept], [accepted[row] for row in kept]
            cut = [place for place, row in enumerate(kept) if row in cut]
        sampled = sampled_rows(requests)
        strategy: Strategy | None = None
        matched: Sequence[int] = ()
        if self.pool is not None:
            strategy, matched = self.pool.verified(accepted, sampled, kept)
        elif self.telemetry is not None:
            strategy = next(iter(self.telemetry.tallies))
            self.telemetry.step(strategy, accepted, sampled)
        learned = strategy is not None and strategy.num_steps
        if cut:  # that none is accepted says nothing of the drafter
            matched = [*matched, *cut]
        if learned:
            self._watch([count for row, count in enumerate(accepted) if row not in matched])
        if self.online_drafter is not None:
            name = str(strategy) if learned else None
            request_ids = [one.rid for one in requests]
            self.online_drafter.count_accepted(accepted, request_ids, name, matched, sampled)

    def _watch(self, accepted: Sequence[int]) -> None:
        """Count drafts of the learned drafter; log and count a drafter that an update has cost."""
        warning = self.accept_watch.step(accepted)
        if warning is not None:
            logger.warning(warning)
            if self.telemetry is not None:
                self.telemetry.drafts_lost()

    # -- updates of the target's weights ---------------------------------------------------------

    def mark_target_updated(self) -> None:
        """Note that weights of the target have changed."""
        self.accept_watch.updated()
        if self.online_drafter is not None:
            self.online_drafter.mark_target_updated()

    def finish_copies(self) -> None:
        """Wait until nothing reads the target's weights, which change or are released next."""
        if self.online_drafter is not None:
            self.online_drafter.finish_copies()
