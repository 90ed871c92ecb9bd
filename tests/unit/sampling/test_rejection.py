"""Sampled drafts between two steps: which columns a strategy gets, and of what they were drawn."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.sampling import rejection as sampled
from tlt_sglang.sampling.rejection import RejectionSampling

VOCAB, KNOWN = 10, torch.tensor([1, 3, 4, 8])


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record the values that SGLang's flag is set to."""
    flags: list[bool] = []

    @contextlib.contextmanager
    def flag(on: bool) -> Iterator[None]:
        flags.append(on)
        yield

    monkeypatch.setattr(sampled, "flag", flag)
    return flags


def worker(vocabulary: torch.Tensor | None = KNOWN) -> Any:
    config = SimpleNamespace(vocab_size=VOCAB)
    return SimpleNamespace(
        hot_token_id=vocabulary, target_worker=SimpleNamespace(model_config=config)
    )


def probs(rows: int, size: int = len(KNOWN)) -> torch.Tensor:
    return torch.softmax(torch.randn(rows, size, generator=torch.Generator().manual_seed(0)), -1)


def test_a_small_vocabulary_has_nothing_on_the_rest() -> None:
    own = probs(3)
    whole = RejectionSampling(worker(), 1).spread(own)
    assert whole.shape == (3, VOCAB)
    assert torch.equal(whole[:, KNOWN], own)
    assert torch.allclose(whole.sum(-1), torch.ones(3))
    same = probs(3, VOCAB)
    assert RejectionSampling(worker(None), 1).spread(same) is same


def sampling_batch(greedy: bool = False) -> Any:
    info = SimpleNamespace(top_ks=torch.tensor([1, 1 << 30]), is_all_greedy=greedy)
    return SimpleNamespace(sampling_info=info)


def _give(draft_input: Any) -> Any:
    return draft_input


@pytest.mark.parametrize("topk", [1, 3])
def test_greedy_requests_need_no_distribution(flags: list[bool], topk: int) -> None:
    """A greedy batch keeps SGLang's drafts, the most likely one twice, without more memory."""
    best = probs(2).topk(topk, dim=-1)
    for call in ("prefill", "extend"):
        draft_input: Any = SimpleNamespace(topk_p=best.values, topk_index=best.indices)
        sampling = RejectionSampling(worker(), topk)
        if call == "prefill":
            original = functools.partial(_give, draft_input)
            assert sampling.prefill(original, sampling_batch(True)) is draft_input
        else:
            result = SimpleNamespace(next_draft_input=draft_input)
            sampling.draft_extend(lambda: None, sampling_batch(True), result)
        assert draft_input.topk_index.shape == (2, sampling.columns)
        assert torch.equal(draft_input.topk_index[:, -1], best.indices[:, 0])
        assert draft_input.draft_probs.shape == (2, VOCAB) and not draft_input.draft_probs.any()
        assert draft_input.draft_probs.untyped_storage().nbytes() == 4 * VOCAB
    assert flags == [False, False]


@pytest.mark.parametrize("topk", [1, 3])
def test_a_prefill_drafts_the_most_likely_for_greedy_requests(flags: list[bool], topk: int) -> None:
    own = probs(2)
    sampled = own.argmin(-1, keepdim=True)
    draft_input = SimpleNamespace(draft_probs=own, topk_p=None, topk_index=sampled)
    batch = sampling_batch()
    RejectionSampling(worker(), topk).prefill(lambda: draft_input, batch)
    assert flags == [True]
    index: Any = draft_input.topk_index
    assert index.shape == (2, 1 if topk == 1 else topk + 1)
    assert index[:, -1].tolist() == [int(own[0].argmax()), int(sampled[1])]
    assert torch.equal(draft_input.topk_p, own.gather(1, index))
    assert torch.equal(draft_input.draft_probs, RejectionSampling(worker(), topk).spread(own))


def test_each_strategy_finds_its_columns(flags: list[bool]) -> None:
    """After a draft-extend, which hands out the target's vocabulary."""
    sampling = RejectionSampling(worker(), 3)
    own = probs(2)
    sampled = own.argmin(-1, keepdim=True)

    def draft_input() -> Any:
        result = SimpleNamespace(
            next_draft_input=SimpleNamespace(
                draft_probs=sampling.spread(own), topk_p=own.gather(1, sampled), topk_index=sampled
            )
        )
        sampling.draft_extend(lambda: None, sampling_batch(), result)
        return result.next_draft_input

    best = own.topk(3, dim=-1).indices
    for topk, expected in ((1, sampled), (2, best[:, :2]), (3, best)):
        batch: Any = SimpleNamespace(spec_info=draft_input())
        verify_input: Any = sampling.draft(unchanged, batch, topk)
        assert verify_input is batch
        assert torch.equal(batch.spec_info.topk_index, expected)
        assert torch.equal(batch.spec_info.topk_p, own.gather(1, expected))
    # SGLang samples in its draft-extends, and in drafts of chains.
    assert flags == [True, True, True, False, True, False]


def unchanged(batch: Any) -> Any:
    """Draft nothing: stand in for SGLang's drafter."""
    return batch


def test_a_deferred_distribution_takes_no_memory() -> None:
    draft_input: Any = SimpleNamespace()
    RejectionSampling(worker(), 1).defer(draft_input, 1000, torch.device("cpu"))
    assert draft_input.draft_probs.shape == (1000, VOCAB)
    assert draft_input.draft_probs.untyped_storage().nbytes() == 4 * VOCAB
