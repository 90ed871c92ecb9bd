"""Simulated drafts: the drafter run on its own output over packed sequences.

Training and evaluation both use them. They are teacher-forced: every step reads the token that the
sequence has there, so one pass simulates a draft of `steps` tokens from every index at once
(training-time test, EAGLE-3, arXiv 2503.01840).

At index i the drafter has the target's features of token i and the embedding of token i + 1, and
its step s predicts token i + 2 + s. SGLang feeds it the same way: tokens are shifted left by one,
features and positions are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.losses import (
    CLASSIFICATION_WEIGHT,
    LOSSES,
    LossName,
    feature_regression,
    step_weights,
)
from tlt_sglang.training.models import DraftContext, Drafter


@dataclass(frozen=True)
class Frozen:
    """The embedding and head that a drafter shares with its target and does not train."""

    embedding: Tensor  # [V, N]
    head: Tensor  # [D, N], rows of the target's head for the draft vocabulary
    draft_ids: Tensor  # [D] int64, ascending: the target's id of each draft token
    draft_index: Tensor  # [V] int64: the index in the draft vocabulary, -1 for other tokens
    target_head: Tensor  # [D, N]: as `head`, of the target's present version

    @staticmethod
    def of(
        embedding: Tensor, head: Tensor, draft_ids: Tensor, own_head: Tensor | None = None
    ) -> Frozen:
        """Build it from the target's whole embedding and head [V, N].

        `own_head` [D, N] is the drafter's head where that is of an older version of the target.
        """
        index = torch.full((len(head),), -1, dtype=torch.int64, device=head.device)
        index[draft_ids] = torch.arange(len(draft_ids), device=head.device)
        rows = head if len(draft_ids) == len(head) else head[draft_ids].contiguous()
        return Frozen(embedding, rows if own_head is None else own_head, draft_ids, index, rows)

    def to(self, device: torch.device, dtype: torch.dtype) -> Frozen:
        """Return it on `device` in `dtype`; a shared head stays shared."""
        head = self.head.to(device, dtype)
        same = self.target_head is self.head
        return Frozen(
            self.embedding.to(device, dtype),
            head,
            self.draft_ids.to(device),
            self.draft_index.to(device),
            head if same else self.target_head.to(device, dtype),
        )


@dataclass(frozen=True)
class Step:
    """One simulated step, at R indices."""

    hidden: Tensor  # [R, N]: what the head takes
    logits: Tensor  # [R, D]
    labels: Tensor  # [R] int64: draft index of the token that comes there, -1 if it has none
    counts: Tensor  # [R] bool: it predicts a token of a response
    source: Tensor  # [R] int64: the index whose last hidden state the target predicts from


def simulate(
    drafter: Drafter, frozen: Frozen, batch: PackedBatch, steps: int, rows: Tensor | None = None
) -> Iterator[Step]:
    """Yield steps 0 to `steps` - 1 at the indices `rows` [R]; by default at all of them, R = T.

    The drafter runs at every index; the head, as large as the drafter, only at `rows`.
    """
    if rows is None:
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
    context = DraftContext.of(batch.lengths, batch.positions)
    hidden = batch.features
    for number in range(steps):
        token, _ = batch.shifted(1 + number)
        embeds = nn.functional.embedding(batch.ids[token], frozen.embedding)
        out, hidden = drafter(embeds, hidden, context)
        following, _ = batch.shifted(2 + number)
        labels = frozen.draft_index[batch.ids[following[rows]]]
        out = out[rows]
        logits = nn.functional.linear(out, frozen.head)
        yield Step(out, logits, labels, batch.counts(number)[rows], token[rows])


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, with what its accuracy is computed from."""

    total: Tensor
    hits: list[Tensor]
    """Predictions of each step whose likeliest token is the right one."""
    tokens: int
    """Predictions of the first step that count."""


def loss_of(
    drafter: Drafter, frozen: Frozen, batch: PackedBatch, steps: int, name: LossName = "soft"
) -> Loss:
    """Return the loss: `name` of every step, and for EAGLE the regression of features.

    A prediction counts where the next token is in the draft vocabulary: elsewhere the drafter can
    only be wrong, and should not learn to compensate for it.
    """
    # The head and the target run only where some step predicts a token of a response.
    counted = torch.stack([batch.counts(number) for number in range(steps)])
    rows = counted.any(0).nonzero().squeeze(-1)
    target, target_row = _target(frozen, batch, rows, steps)
    total = torch.zeros((), device=target.device)
    hits = []
    weights = step_weights(steps)
    for step, share in zip(simulate(drafter, frozen, batch, steps, rows), weights, strict=True):
        weight = (step.counts & (step.labels >= 0)).float()
        logits = step.logits.float()  # in bfloat16 the argmax of a row takes six times as long
        step_loss = LOSSES[name](logits, target[target_row[step.source]], weight)
        if drafter.config.algorithm == "eagle":
            regression = feature_regression(step.hidden, batch.last[step.source], weight)
            step_loss = regression + CLASSIFICATION_WEIGHT * step_loss
        total = total + share * step_loss / sum(weights)
        right = (logits.detach().argmax(-1) == step.labels) & step.counts
        hits.append(right.sum())
    return Loss(total, hits, int(batch.counts(0).sum()))


def _target(frozen: Frozen, batch: PackedBatch, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the target's distributions [R', D] over the draft vocabulary for steps at `rows`.

    The second tensor maps each index to its row among them, [T] int64.
    """
    needed = torch.zeros(len(batch.ids), dtype=torch.bool, device=rows.device)
    for number in range(steps):
        needed[batch.shifted(1 + number)[0][rows]] = True
    with torch.no_grad(), torch.autocast(batch.last.device.type, enabled=False):
        logits = nn.functional.linear(batch.last[needed], frozen.target_head)
        return logits.float().softmax(-1), needed.cumsum(0) - 1
