"""The distribution of sampled tokens: what a model's logits say, and whether samples agree.

`joint` computes the exact probability of every sequence of the first few tokens from transformers'
logits; `p_value` is Pearson's chi-square test of counted sequences against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

LEAST_EXPECTED = 5.0
"""Cells in which fewer samples are expected are pooled with others."""


@dataclass(frozen=True)
class Sampling:
    """Parameters of `/generate` that shape the distribution; the defaults change nothing."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0

    def parameters(self) -> dict[str, float]:
        """For sampling_params."""
        return dict(vars(self))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] -> float64 [B, V], filtered as SGLang's plain sampler does.

        Top-k and top-p both look at the unfiltered distribution; min-p at what they leave.
        """
        probs = (logits.double() / self.temperature).softmax(-1)
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before > self.top_p, 0.0)
        if self.top_k > 0:
            ordered[:, self.top_k :] = 0.0
        ordered = ordered.masked_fill(ordered < ordered[:, :1] * self.min_p, 0.0)
        kept = torch.zeros_like(probs).scatter_(-1, order, ordered)
        return kept / kept.sum(-1, keepdim=True)


Joint = dict[tuple[int, ...], float]


def joint(model: torch.nn.Module, prompt: Sequence[int], length: int, sampling: Sampling) -> Joint:
    """Probability of every sequence of `length` tokens that may follow `prompt`; they add to 1."""
    sequences: Joint = {(): 1.0}
    for _ in range(length):
        prefixes = list(sequences)
        rows = []
        for start in range(0, len(prefixes), 512):
            ids = [[*prompt, *prefix] for prefix in prefixes[start : start + 512]]
            with torch.inference_mode():
                logits = model(torch.tensor(ids)).logits[:, -1]
            rows.append(sampling.probabilities(logits))
        probs = torch.cat(rows)
        sequences = {
            (*prefix, token): sequences[prefix] * probs[i, token].item()
            for i, prefix in enumerate(prefixes)
            for token in probs[i].nonzero().flatten().tolist()
        }
    return sequences


def p_value(expected: Joint, samples: Iterable[Sequence[int]]) -> float:
    """How likely samples drawn from `expected` would differ from it at least as much as these.

    A sequence outside of `expected`'s support is never drawn: 0.0. Sequences that are expected
    fewer than `LEAST_EXPECTED` times are pooled with those that begin alike, as far as it takes,
    so that every position stays under test.
    """
    observed = Counter(tuple(sample) for sample in samples)
    if any(sample not in expected for sample in observed):
        return 0.0
    number = observed.total()
    cells = {sequence: [number * p, float(observed[sequence])] for sequence, p in expected.items()}
    for kept in reversed(range(len(next(iter(expected))))):
        for sequence in [s for s, (count, _) in cells.items() if count < LEAST_EXPECTED]:
            pool = cells.setdefault(sequence[:kept], [0.0, 0.0])
            expected_count, count = cells.pop(sequence)
            pool[0] += expected_count
            pool[1] += count
    rest = cells.get((), [0.0, 0.0])
    if rest[0] < LEAST_EXPECTED and len(cells) > 1 and () in cells:
        del cells[()]
        largest = max(cells.values())
        largest[0] += rest[0]
        largest[1] += rest[1]
    assert len(cells) > 1, "too few samples for any test"
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells.values())
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    half = torch.tensor(statistic / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, half))
