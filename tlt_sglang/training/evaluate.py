"""Accept length without an engine: how far drafts would get along the target's own responses.

Exact for chains of most likely tokens. A draft is accepted if it is the token that the target
chose, at temperature 0 and above: SGLang accepts a single draft d with probability p(d) and samples
from the rest otherwise, which is the same as sampling from p and comparing with d. So the target's
responses, greedy or sampled, are all that is needed.

A chain drafted by sampling from q accepts a token x of the target's sampled text with probability
min(1, q(x) / p(x)); over x ~ p that is sum(min(p, q)), as in rejection sampling
(`sampling.rejection`). p is restricted to the drafter's vocabulary, which makes the accept length a
percent or two low.

Trees are simulated along the text: a node is drafted if its cumulative probability is among the
best `tokens` - 1 of the levels above it. Nodes off the text are not expanded further, so a tree's
accept length is an upper bound, a few percent high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.simulate import Frozen, Step, simulate


@dataclass
class AcceptLength:
    """Counts the tokens that verify steps commit."""

    verify_steps: int = 0
    committed: int = 0
    depth_hits: list[int] = field(default_factory=list)
    """Verify steps in which the draft at each depth was accepted."""

    @property
    def mean(self) -> float:
        """Return committed tokens per verify step, with the bonus token; 1.0 without any step."""
        return self.committed / self.verify_steps if self.verify_steps else 1.0

    def join(self, other: AcceptLength) -> None:
        """Add the counts of `other`."""
        self.verify_steps += other.verify_steps
        self.committed += other.committed
        self.depth_hits += [0] * (len(other.depth_hits) - len(self.depth_hits))
        for depth, hits in enumerate(other.depth_hits):
            self.depth_hits[depth] += hits

    def add(self, accepted: int) -> None:
        """Count a verify step in which `accepted` drafts were accepted."""
        self.verify_steps += 1
        self.committed += 1 + accepted
        while len(self.depth_hits) < accepted:
            self.depth_hits.append(0)
        for depth in range(accepted):
            self.depth_hits[depth] += 1


@torch.inference_mode()
def accept_length(
    drafter: Drafter,
    frozen: Frozen,
    sequences: Iterable[TokenSequence[Tensor]],
    steps: int,
    topk: int = 1,
    tokens: int | None = None,
    temperature: float = 0.0,
) -> AcceptLength:
    """Measure a chain of `steps` drafts, or a tree with `topk` branches and `tokens` nodes.

    With a `temperature` the drafts of a chain are sampled, and `sequences` have to be responses
    that the target sampled at it.
    """
    drafter.eval()
    length = AcceptLength()
    rng = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = PackedBatch.of([sequence]).to(frozen.head.device)
        accepted: Callable[[Step], Tensor]
        if temperature > 0:
            accepted = _Sampled(frozen, batch, temperature, rng)
        else:
            accepted = _Likeliest(batch, topk, tokens or steps + 1)
        reached = _reached(drafter, frozen, batch, steps, accepted)
        _walk(length, reached.tolist(), sequence.response_start, len(sequence), steps)
    return length


def _reached(
    drafter: Drafter,
    frozen: Frozen,
    batch: PackedBatch,
    steps: int,
    accepted: Callable[[Step], Tensor],
) -> Tensor:
    """Return the drafts accepted in a row from each index [T]; `accepted` judges one step."""
    alive = torch.ones(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
    reached = torch.zeros(len(batch.ids), dtype=torch.int64, device=batch.ids.device)
    for step in simulate(drafter, frozen, batch, steps):
        alive = alive & accepted(step)
        reached += alive
    return reached


class _Likeliest:
    """Accepts where the text's token is one of a step's likeliest drafts and in the tree."""

    def __init__(self, batch: PackedBatch, topk: int, tokens: int) -> None:
        self._topk, self._tokens = topk, tokens
        self._path = torch.zeros(len(batch.ids), device=batch.ids.device)
        self._rivals: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        scores = step.logits.float().log_softmax(-1)
        best = scores.topk(self._topk, dim=-1)
        hit = best.indices == step.labels.unsqueeze(-1)
        if self._topk == 1:
            return hit.any(-1)
        self._rivals.append(self._path.unsqueeze(-1) + best.values)
        rank = hit.float().argmax(-1, keepdim=True)
        self._path = self._rivals[-1].gather(-1, rank).squeeze(-1)
        better = (torch.cat(self._rivals, dim=-1) > self._path.unsqueeze(-1)).sum(-1)
        return hit.any(-1) & (better < self._tokens - 1)


class _Sampled:
    """Accepts a sampled draft with the probability of rejection sampling."""

    def __init__(
        self, frozen: Frozen, batch: PackedBatch, temperature: float, rng: torch.Generator
    ) -> None:
        self._temperature, self._rng = temperature, rng
        logits = nn.functional.linear(batch.last, frozen.target_head)
        self._target = self._scores(logits)

    def __call__(self, step: Step) -> Tensor:
        label = step.labels.clamp_min(0).unsqueeze(-1)
        drafted = self._scores(step.logits).gather(-1, label)
        ratio = (drafted - self._target[step.source].gather(-1, label)).squeeze(-1).exp()
        coins = torch.rand(len(ratio), generator=self._rng).to(ratio.device)
        return (coins < ratio) & (step.labels >= 0)

    def _scores(self, logits: Tensor) -> Tensor:
        return (logits.float() / self._temperature).log_softmax(-1)


def _walk(
    counts: AcceptLength, reached: Sequence[int], prompt: int, length: int, steps: int
) -> None:
    """Count verify steps as an engine takes them: each starts where the previous one ended.

    The prefill commits the first token of the response, at `prompt`; a verify step whose last
    committed token is at c drafts from index c - 1. A step that the end of the text cuts short is
    left out, unless all of its drafts are accepted.
    """
    last = prompt
    while last + 1 < length:
        rest = length - 1 - last
        accepted = min(reached[last - 1], rest)
        if accepted == rest < steps:
            return
        counts.add(accepted)
        last += 1 + accepted


def by_kind(
    sequences: Sequence[TokenSequence[Tensor]], kinds: Sequence[str], most: int
) -> dict[str, list[TokenSequence[Tensor]]]:
    """Return at most `most` sequences of each kind."""
    groups: dict[str, list[TokenSequence[Tensor]]] = {}
    for i, kind in enumerate(kinds):
        group = groups.setdefault(kind, [])
        if len(group) < most:
            group.append(sequences[i])
    return groups
