"""Penalties in a verify step against plain decoding, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.cpu import penalties

VOCAB = 50
EOS, STOP, EXTRA = 3, 7, 11
# Node 0 has the children 1 and 2, node 1 the children 3 and 4, node 4 the child 5; 6 hangs nowhere.
CHILDREN = [1, 3, -1, -1, 5, -1, -1]
SIBLINGS = [-1, 2, -1, 4, -1, -1, -1]
PATHS = [[], [1], [2], [1, 3], [1, 4], [1, 4, 5], []]


@dataclass
class Parameters:
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_token_ids: set[int] | None = field(default_factory=lambda: {STOP})


def request(output_ids: list[int], **parameters: Any) -> Any:
    """Return a stand-in for SGLang's `Req`."""
    return SimpleNamespace(
        output_ids=output_ids,
        sampling_params=Parameters(**parameters),
        eos_token_ids={EOS},
        tokenizer=SimpleNamespace(additional_stop_token_ids=[EXTRA], eos_token_id=EOS),
    )


def plain(logits: torch.Tensor, parameters: dict[str, Any], output: list[int]) -> torch.Tensor:
    """One row of plain decoding after `output`, written as SGLang's penalizers do it."""
    frequency, presence, scaling = torch.zeros(VOCAB), torch.zeros(VOCAB), torch.ones(VOCAB)
    for token in output:
        frequency[token] += parameters.get("frequency_penalty", 0.0)
        presence[token] = parameters.get("presence_penalty", 0.0)
        scaling[token] = parameters.get("repetition_penalty", 1.0)
    row = logits - frequency - presence
    if len(output) < parameters.get("min_new_tokens", 0):
        row[[EOS, STOP, EXTRA]] = -torch.inf
    return torch.where(row < 0, row * scaling, row / scaling)


@pytest.mark.parametrize(
    "parameters",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 6},
        {"frequency_penalty": -0.3, "presence_penalty": 0.2, "repetition_penalty": 0.8},
        {"frequency_penalty": 0.3, "repetition_penalty": 1.2, "min_new_tokens": 8},
    ],
    ids=str,
)
def test_as_plain_decoding(parameters: dict[str, Any]) -> None:
    torch.manual_seed(0)
    output = [5, 9, 5, 12]
    drafts = torch.tensor([[12, 9, 20, 5, 21, 9, 30]])
    requests = [request(output, **parameters), request([1, 2])]
    logits = torch.randn(14, VOCAB) * 3
    before = logits.clone()
    trees = [torch.tensor(links).expand(2, -1) for links in (CHILDREN, SIBLINGS)]
    penalties.apply(logits, requests, drafts.expand(2, -1), *trees)
    for row, path in enumerate(PATHS):
        tokens = output + [int(drafts[0, node]) for node in path]
        torch.testing.assert_close(logits[row], plain(before[row], parameters, tokens))
    assert torch.equal(logits[7:], before[7:])


def test_paths_of_a_chain_and_of_a_tree() -> None:
    assert penalties.paths([1, 2, 3, -1], [-1] * 4) == [[], [1], [1, 2], [1, 2, 3]]
    assert penalties.paths(CHILDREN, SIBLINGS) == PATHS


def test_without_tokenizer() -> None:
    """`--skip-tokenizer-init` leaves requests without one."""
    one = request([4], min_new_tokens=9)
    one.tokenizer = None
    logits = torch.zeros(1, VOCAB)
    links = torch.tensor([[-1]])
    penalties.apply(logits, [one], torch.tensor([[4]]), links, links)
    assert logits[0].isneginf().nonzero().flatten().tolist() == [EOS, STOP]
