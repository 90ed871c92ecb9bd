"""Which requests commit one token a verify step, and how; and in which order penalties come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tlt_sglang.sampling import logits, logprobs, penalties


def request(output: int = 0, **parameters: Any) -> Any:
    """Return a stand-in for SGLang's `Req` with so many tokens of output."""
    plain = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
    }
    return SimpleNamespace(
        output_ids=[5] * output, sampling_params=SimpleNamespace(**plain | parameters)
    )


def tree(size: int, width: int) -> Any:
    """Return a verify step of chains."""
    links = torch.arange(1, width + 1).repeat(size, 1)
    links[:, -1] = -1
    return SimpleNamespace(
        draft_token_num=width,
        retrieve_next_token=links,
    )


def test_requests_with_a_processor() -> None:
    def info(processors: dict[int, Any] | None) -> Any:
        return SimpleNamespace(
            has_custom_logit_processor=processors is not None, custom_logit_processor=processors
        )

    assert logits.processed_rows(info(None)) == set()
    entries = {
        number: SimpleNamespace(processor=None, rows=rows)
        for number, rows in ((1, [0, 3]), (2, [2]))
    }
    assert logits.processed_rows(info(entries)) == {0, 2, 3}


def test_requests_that_are_penalised_for_their_output() -> None:
    requests = [
        request(9),
        request(9, frequency_penalty=0.1),
        request(9, presence_penalty=-0.1),
        request(9, repetition_penalty=0.9),
        request(9, min_new_tokens=8),  # one token may still be on its way to the host
        request(10, min_new_tokens=8),
    ]
    assert logits.penalised_rows(requests) == {1, 2, 3, 4}


def test_their_drafts_are_cut_off() -> None:
    step = tree(3, 4)
    links, before = step.retrieve_next_token, step.retrieve_next_token.clone()
    logits.cut_drafts(step, {0, 2})
    assert step.retrieve_next_token[:, 0].tolist() == [-1, 1, -1]
    assert torch.equal(step.retrieve_next_token[:, 1:], before[:, 1:])
    assert torch.equal(links, before)  # which may belong to every step


def test_nothing_is_cut_in_vain() -> None:
    step, single = tree(2, 3), tree(2, 1)
    links, links_of_single = step.retrieve_next_token, single.retrieve_next_token
    logits.cut_drafts(step, set())
    logits.cut_drafts(single, {0})
    assert step.retrieve_next_token is links
    assert single.retrieve_next_token is links_of_single


def test_penalties_that_scale_come_last() -> None:
    kinds: list[Any] = [
        type(name, (), {"is_multiplicative": name == "Repetition"})
        for name in ("Repetition", "Presence", "Frequency")
    ]
    penalizers: dict[Any, Any] = {kind: kind() for kind in kinds}
    ordered = penalties.in_order(penalizers)
    assert [kind.__name__ for kind in ordered] == ["Frequency", "Presence", "Repetition"]
    assert ordered == penalizers


def test_logprobs_of_rounded_probabilities() -> None:
    torch.manual_seed(0)
    scores, temperatures = torch.randn(6, 50) * 4, torch.tensor([[0.01], [1.0], [1.7]])
    scores[4, :40] = -torch.inf
    scale = temperatures.repeat_interleave(2, dim=0)
    changed = logprobs.of_probabilities(scores, temperatures)
    got = torch.log_softmax(changed / scale, dim=-1)
    expected = torch.softmax(scores / scale, dim=-1).log()
    assert expected[:2].isinf().any()
    torch.testing.assert_close(got, expected)
