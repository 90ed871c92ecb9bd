"""Embeddings beside tokens replace the rows of their own requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tlt_sglang.engine.embeddings import place

EMBEDS = torch.arange(8, dtype=torch.float32).view(4, 2)


def batch(*requests: tuple[bool, int], overrides: Any = None) -> Any:
    """Return a prefill of requests, each with or without embeddings and with a length."""
    embeddings, positions = (None, None) if overrides is None else overrides
    return SimpleNamespace(
        reqs=[SimpleNamespace(input_embeds=[[0.0]] if brings else None) for brings, _ in requests],
        extend_lens=[length for _, length in requests],
        input_embeds=EMBEDS if any(brings for brings, _ in requests) else None,
        replace_embeds=embeddings,
        replace_positions=positions,
    )


def test_embeddings_beside_tokens() -> None:
    prefill = batch((False, 3), (True, 1), (False, 2), (True, 3))
    place(prefill)
    assert prefill.input_embeds is None
    assert prefill.replace_positions.tolist() == [3, 6, 7, 8]
    assert prefill.replace_embeds.tolist() == EMBEDS.tolist()
    assert prefill.replace_embeds.dtype == torch.bfloat16


def test_overrides_of_another_request_remain() -> None:
    prefill = batch((False, 3), (True, 4), overrides=(torch.ones(1, 2), torch.tensor([1])))
    place(prefill)
    assert prefill.replace_positions.tolist() == [1, 3, 4, 5, 6]
    assert prefill.replace_embeds.tolist() == [[1.0, 1.0], *EMBEDS.tolist()]


def test_one_kind_alone_is_left_as_it_is() -> None:
    for prefill in (batch((True, 1), (True, 3)), batch((False, 4))):
        before = dict(vars(prefill))
        place(prefill)
        assert vars(prefill) == before
