"""A tiny drafter, its frozen parts and random sequences to train it on."""

from __future__ import annotations

import torch

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.models import Algorithm, DraftConfig, Drafter
from tlt_sglang.training.simulate import Frozen

VOCAB, SIZE = 48, 16


def config(algorithm: Algorithm = "eagle3", draft_vocab: int = 32) -> DraftConfig:
    return DraftConfig(
        algorithm,
        hidden_size=SIZE,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=128,
        vocab_size=VOCAB,
        draft_vocab_size=draft_vocab if algorithm == "eagle3" else VOCAB,
    )


def drafter(algorithm: Algorithm = "eagle3", seed: int = 0) -> Drafter:
    torch.manual_seed(seed)
    return Drafter(config(algorithm))


def frozen(algorithm: Algorithm = "eagle3") -> Frozen:
    generator = torch.Generator().manual_seed(7)
    embedding = torch.randn(VOCAB, SIZE, generator=generator)
    head = torch.randn(VOCAB, SIZE, generator=generator)
    size = config(algorithm).draft_vocab_size
    return Frozen.of(embedding, head, torch.randperm(VOCAB, generator=generator)[:size].sort()[0])


def sequences(
    lengths: list[int], algorithm: Algorithm = "eagle3", seed: int = 1
) -> list[TokenSequence[torch.Tensor]]:
    """Return random sequences of these lengths; the first third of each is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    features = config(algorithm).features
    result = []
    for length in lengths:
        ids = torch.randint(0, VOCAB, (length,), generator=generator)
        inputs = torch.randn(length, features * SIZE, generator=generator)
        last = torch.randn(length, SIZE, generator=generator)
        result.append(
            TokenSequence(ids, inputs, max(1, length // 3), last if features > 1 else None)
        )
    return result
