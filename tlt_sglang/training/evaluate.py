"""Accept length without an engine: how far drafts would get along the target's own responses.

Exact for chains of most likely tokens: a draft is accepted if it is the token that the target
chose, so the target's responses are all that is needed.

Sampled responses are drafted for by coupled sampling (`sampling.coupled`): of the noise with which
the target would have chosen each token of the text, some is drawn, and the drafts are the tokens
with the largest log q + noise. For that, p is restricted to the drafter's vocabulary.

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
from tlt_sglang.sampling.ranking import DRAFT_TEMPERATURE, chances
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

    With a `temperature` the drafts are those of coupled sampling, and `sequences` have to be
    responses that the target sampled at it.
    """
    drafter.eval()
    length = AcceptLength()
    rng = torch.Generator().manual_seed(0)
    for sequence in sequences:
        batch = PackedBatch.of([sequence]).to(frozen.head.device)
        propose = _likeliest(topk)
        if temperature > 0:
            propose = _coupled(frozen, batch, temperature, topk, rng)
        accepted = _Tree(propose, tokens or steps + 1)
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


class _Tree:
    """Accepts where the text's token is one of a step's best drafts and in the tree.

    `propose` returns the log of the weights, by which a tree's nodes are ranked, and the columns of
    the `topk` best drafts of a step, each [T, topk].
    """

    def __init__(self, propose: Callable[[Step], tuple[Tensor, Tensor]], tokens: int) -> None:
        self._propose, self._tokens = propose, tokens
        self._path: Tensor | float = 0.0
        self._rivals: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        weights, columns = self._propose(step)
        hit = columns == step.labels.unsqueeze(-1)
        if columns.shape[-1] == 1:
            return hit.any(-1)
        path = torch.as_tensor(self._path, device=weights.device).unsqueeze(-1)
        self._rivals.append(path + weights)
        rank = hit.float().argmax(-1, keepdim=True)
        self._path = self._rivals[-1].gather(-1, rank).squeeze(-1)
        better = (torch.cat(self._rivals, dim=-1) > self._path.unsqueeze(-1)).sum(-1)
        return hit.any(-1) & (better < self._tokens - 1)


def _likeliest(topk: int) -> Callable[[Step], tuple[Tensor, Tensor]]:
    def propose(step: Step) -> tuple[Tensor, Tensor]:
        best = step.logits.float().log_softmax(-1).topk(topk, dim=-1)
        return best.values, best.indices

    return propose


def _coupled(
    frozen: Frozen, batch: PackedBatch, temperature: float, topk: int, rng: torch.Generator
) -> Callable[[Step], tuple[Tensor, Tensor]]:
    """Return the drafts of coupled sampling, for noise with which the target says the text."""
    logits = nn.functional.linear(batch.last, frozen.target_head).float()
    following, _ = batch.shifted(1)
    labels = frozen.draft_index[batch.ids[following]]
    noise = noise_given_choice((logits / temperature).log_softmax(-1), labels, rng)

    def propose(step: Step) -> tuple[Tensor, Tensor]:
        scores = step.logits.float() / (DRAFT_TEMPERATURE * temperature) + noise[step.source]
        best = scores.topk(topk, dim=-1)
        return chances(best.values).log(), best.indices

    return propose


def noise_given_choice(log_p: Tensor, chosen: Tensor, rng: torch.Generator) -> Tensor:
    """Return Gumbel noise g [T, V] of which the argmax of log_p + g is `chosen` [T].

    It is distributed as Gumbel noise is among all that have this argmax: the largest sum is
    independent of where it is, and the others are Gumbel variables truncated at it (A* sampling,
    arXiv 1411.0030). A row whose `chosen` is -1 gets noise as it comes.
    """
    free = -torch.empty(log_p.shape).exponential_(generator=rng).log().to(log_p.device)
    largest = -torch.empty(len(log_p), 1).exponential_(generator=rng).log().to(log_p.device)
    # -log(exp(-largest) + exp(-(log_p + free))) is at most `largest`; minus log_p it is the noise.
    bounded = -torch.logaddexp(log_p - largest, -free)
    index = chosen.clamp_min(0).unsqueeze(-1)
    bounded.scatter_(-1, index, largest - log_p.gather(-1, index))
    return torch.where(chosen.unsqueeze(-1) >= 0, bounded, free)


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
