"""Accept length without an engine: how far a drafter would have got along the target's own text.

Exact for chains of most likely tokens. One is accepted if it is the token that the target chose, at
temperature zero and above: SGLang accepts a lone draft d with probability p(d) and samples from the
rest otherwise, which is the same as sampling from p and looking whether d came out. So the target's
responses, greedy or sampled, are all that is needed.

Chains that are sampled (`drafters.sampled`) get past a token x of the target's sampled text with
probability min(1, q(x) / p(x)): over x ~ p that is sum(min(p, q)), what verification accepts. p is
taken over the drafter's vocabulary, which makes the figure a percent or two low.

Trees are simulated along the text: a node is drafted if its cumulative probability is among the
best `tokens` - 1 of those that the levels above it have brought up. Nodes off the text are not
expanded further, so a tree's figure is an upper bound, a few percent high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.batches import Batch
from tlt_sglang.training.models import Drafter
from tlt_sglang.training.simulate import Frozen, Step, simulate


@dataclass
class AcceptLength:
    """Tokens a verify step commits, over many of them."""

    rounds: int = 0
    committed: int = 0
    depth_hits: list[int] = field(default_factory=list)
    """Rounds in which the draft at each depth was accepted."""

    @property
    def mean(self) -> float:
        """Committed tokens a round, the target's own one among them; 1.0 without rounds."""
        return self.committed / self.rounds if self.rounds else 1.0

    def join(self, other: AcceptLength) -> None:
        """Take in the rounds of another."""
        self.rounds += other.rounds
        self.committed += other.committed
        self.depth_hits += [0] * (len(other.depth_hits) - len(self.depth_hits))
        for depth, hits in enumerate(other.depth_hits):
            self.depth_hits[depth] += hits

    def add(self, accepted: int) -> None:
        """A round in which so many drafts were accepted."""
        self.rounds += 1
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
    """Of a chain of `steps` drafts, or of a tree with `topk` branches and `tokens` nodes.

    With a `temperature`: of chains that are sampled, on text that the target sampled at it.
    """
    drafter.eval()
    found = AcceptLength()
    chance = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = Batch.of([sequence]).to(frozen.head.device)
        accepted: Callable[[Step], Tensor]
        if temperature > 0:
            accepted = _Drawn(frozen, batch, temperature, chance)
        else:
            accepted = _Likeliest(batch, topk, tokens or steps + 1)
        reached = _reached(drafter, frozen, batch, steps, accepted)
        _walk(found, reached.tolist(), sequence.response_start, len(sequence), steps)
    return found


def _reached(
    drafter: Drafter,
    frozen: Frozen,
    batch: Batch,
    steps: int,
    accepted: Callable[[Step], Tensor],
) -> Tensor:
    """[T]: drafts accepted, one after the other, from each index; `accepted` tells of a step."""
    alive = torch.ones(len(batch.ids), dtype=torch.bool, device=batch.ids.device)
    reached = torch.zeros(len(batch.ids), dtype=torch.int64, device=batch.ids.device)
    for step in simulate(drafter, frozen, batch, steps):
        alive = alive & accepted(step)
        reached += alive
    return reached


class _Likeliest:
    """Whether the text's token is among a step's most likely drafts, and its node in the tree."""

    def __init__(self, batch: Batch, topk: int, tokens: int) -> None:
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
        ahead = (torch.cat(self._rivals, dim=-1) > self._path.unsqueeze(-1)).sum(-1)
        return hit.any(-1) & (ahead < self._tokens - 1)


class _Drawn:
    """Whether a draft that is drawn gets past the text's token, by the throw of a coin."""

    def __init__(
        self, frozen: Frozen, batch: Batch, temperature: float, chance: torch.Generator
    ) -> None:
        self._temperature, self._chance = temperature, chance
        logits = nn.functional.linear(batch.last, frozen.target_head)
        self._target = self._scores(logits)

    def __call__(self, step: Step) -> Tensor:
        label = step.labels.clamp_min(0).unsqueeze(-1)
        drafted = self._scores(step.logits).gather(-1, label)
        ratio = (drafted - self._target[step.source].gather(-1, label)).squeeze(-1).exp()
        coins = torch.rand(len(ratio), generator=self._chance).to(ratio.device)
        return (coins < ratio) & (step.labels >= 0)

    def _scores(self, logits: Tensor) -> Tensor:
        return (logits.float() / self._temperature).log_softmax(-1)


def _walk(
    found: AcceptLength, reached: Sequence[int], prompt: int, length: int, steps: int
) -> None:
    """Rounds as an engine makes them: each begins where the one before ended.

    The prefill commits the first token of the response, at `prompt`; a round that begins with the
    last committed token at c drafts from index c - 1. Rounds that the text ends are left out, but
    for one that accepts all there is.
    """
    last = prompt
    while last + 1 < length:
        left = length - 1 - last
        accepted = min(reached[last - 1], left)
        if accepted == left < steps:
            return
        found.add(accepted)
        last += 1 + accepted


def by_kind(
    sequences: Sequence[TokenSequence[Tensor]], kinds: Sequence[str], most: int
) -> dict[str, list[TokenSequence[Tensor]]]:
    """At most `most` sequences of each kind."""
    groups: dict[str, list[TokenSequence[Tensor]]] = {}
    for i, kind in enumerate(kinds):
        group = groups.setdefault(kind, [])
        if len(group) < most:
            group.append(sequences[i])
    return groups
