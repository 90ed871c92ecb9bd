"""N-gram drafting in a decode step: looking up matches, and verifying what followed them.

Matches are looked up before the policy is asked, so that it knows how long they are; with overlap
scheduling they lack the tokens in flight (`engine.in_flight`). The strategy `ngram` drafts a chain
from them; a chain of the drafter takes them over for the requests whose match is long enough.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tlt_sglang import upstream
from tlt_sglang.admission.sampling import PREDICTED_OUTPUT
from tlt_sglang.drafters.ngram import Matches, NgramIndex, RequestText
from tlt_sglang.drafters.ngram_kernels import LONGEST
from tlt_sglang.engine.deferred import request_ids
from tlt_sglang.engine.in_flight import InFlight
from tlt_sglang.engine.to_device import to_device
from tlt_sglang.strategy.strategies import Strategy, depth_of, uses_match

if TYPE_CHECKING:
    from tlt_sglang.graphs.states import RuntimeStates
    from tlt_sglang.upstream.protocols import Batch, Request, StepResult, VerifyInput

MAX_LOOKUP_BATCH = 16
"""Requests up to which matches are looked up in every step; a larger batch has no time for it."""
READ_EVERY = 8
"""Steps after which new tokens go into the index; they always do before it drafts."""


class NgramDrafting:
    """The n-gram drafter of an engine with several strategies."""

    def __init__(self, states: RuntimeStates, memory_mb: int) -> None:
        self.index = NgramIndex(memory_mb)
        self.in_flight = InFlight()
        self._states = states
        chains = [depth_of(strategy) for strategy in states.strategies if strategy.topk == 1]
        self._max_depth = max(chains, default=1)
        self._steps = 0
        self.matches: Matches | None = None
        """The matches of the present step; None where they were not looked up."""

    def prefill(self, batch: Batch) -> None:
        """Note a prefill that is launched."""
        self.index.begin(request_ids(batch))
        self.index.extend([text for one in batch.reqs if (text := predicted(one)) is not None])
        self.in_flight.prefill(batch)

    def begin(self, batch: Batch | None) -> Sequence[int]:
        """Look up the matches of a step that begins, None for a step without them; return their
        lengths, () where there are none."""
        self.matches = None
        if batch is None or len(batch.reqs) > MAX_LOOKUP_BATCH:
            return ()
        self.matches = self._look_up(batch)
        return self.matches.lengths

    def end(self, batch: Batch, result: StepResult) -> None:
        """Note a step that is launched; take in new tokens now and then, so that a look-up has
        little to read."""
        self.in_flight.begin(batch, result)
        self._steps += 1
        if self._steps % READ_EVERY == 0:
            self._read(batch)

    def verify_input(self, batch: Batch) -> VerifyInput:
        """Return SGLang's verify input of a chain of what followed the matches."""
        worker = self._states.worker._draft_worker
        matches = self.matches or self._look_up(batch)
        drafts, _ = self.in_flight.drafts(matches, batch, worker.speculative_num_steps)
        return upstream.current().chain_to_verify(worker, batch, drafts)

    def take_over(self, verify_input: VerifyInput, strategy: Strategy, batch: Batch) -> None:
        """Replace the drafter's chain by what followed, for requests with a long enough match."""
        matches = self.matches
        if matches is None or not (chosen := matched_rows(strategy, matches.lengths)):
            return
        depth = strategy.num_steps
        drafts = verify_input.draft_token.view(-1, depth + 1)
        continued, counts = self.in_flight.drafts(matches, batch, depth)
        rows = to_device(chosen, drafts.device)
        continued, counts = continued[rows], counts[rows]
        replaced = torch.arange(depth, device=drafts.device) < counts[:, None]
        drafts[rows, 1:] = torch.where(replaced, continued.to(drafts.dtype), drafts[rows, 1:])

    def outcomes(self, result: StepResult) -> list[tuple[int, bool]]:
        """Return, per request, the committed tokens that the match predicted, and whether it then
        was wrong. Empty where that would wait for a device."""
        matches, ids = self.matches, result.next_token_ids
        if matches is None or ids.device.type != "cpu":
            return []
        committed = ids.view(len(matches.lengths), -1).numpy()
        outcomes = []
        for row, count in enumerate(result.accept_lens.tolist()):
            limit, same = min(count, matches.counts[row]), 0
            while same < limit and committed[row, same] == matches.drafts[row, same]:
                same += 1
            outcomes.append((same, same < min(count, self._max_depth)))
        return outcomes

    def _read(self, batch: Batch) -> None:
        """Take in what the requests hold that is new."""
        if len(self.index) > 2 * len(batch.reqs):
            self.index.keep(request_ids(batch))
        self.index.extend([(one.rid, one.origin_input_ids, one.output_ids) for one in batch.reqs])

    def _look_up(self, batch: Batch) -> Matches:
        self._read(batch)
        depth = self._max_depth + self.in_flight.max_tokens
        return self.index.look_up(request_ids(batch), depth)


def predicted(request: Request) -> RequestText | None:
    """Return the output that the client of a new request predicts, as a text of its own that
    follows the end of the prompt; None without one."""
    custom = request.sampling_params.custom_params or {}
    output = custom.get(PREDICTED_OUTPUT)
    if not isinstance(output, list) or request.output_ids:
        return None
    return f"{request.rid} {PREDICTED_OUTPUT}", request.origin_input_ids[-LONGEST:], output


def matched_rows(strategy: Strategy, lengths: Sequence[int]) -> list[int]:
    """Return the requests that n-grams draft for in a step of `strategy`, given the lengths of
    their matches."""
    return [row for row, length in enumerate(lengths) if uses_match(strategy, length)]
