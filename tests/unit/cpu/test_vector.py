"""Row-wise kernels against their plain versions, with random shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import reference_kernels as reference
from tlt_sglang.cpu.kernels import vector

SEEDS = range(6)


def shapes(seed: int) -> tuple[torch.Generator, int, int]:
    rng = torch.Generator().manual_seed(seed)
    tokens, size = (int(torch.randint(1, n, (), generator=rng)) for n in (20, 700))
    return rng, tokens, size


@pytest.mark.parametrize("seed", SEEDS)
def test_rms_norm(seed: int) -> None:
    rng, tokens, size = shapes(seed)
    x, residual = (torch.randn(tokens, size, generator=rng) * 3 for _ in range(2))
    weight = torch.randn(size, generator=rng)
    out, total = torch.empty_like(x), residual.clone()
    vector.rms_norm(x.numpy(), weight.numpy(), np.float32(1e-5), out.numpy())
    torch.testing.assert_close(out, reference.rms_norm(x, weight, 1e-5), atol=2e-6, rtol=1e-5)
    vector.add_rms_norm(x.numpy(), total.numpy(), weight.numpy(), np.float32(1e-5), out.numpy())
    assert torch.equal(total, x + residual)
    expected = reference.rms_norm(x + residual, weight, 1e-5)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_silu_and_mul(seed: int) -> None:
    rng, tokens, size = shapes(seed)
    x = torch.randn(tokens, 2 * size, generator=rng) * 20
    x[0, 0], x[0, size - 1] = 200.0, -200.0
    out = torch.empty(tokens, size)
    vector.silu_and_mul(x.numpy(), out.numpy(), np.empty(size, np.int32))
    torch.testing.assert_close(out, reference.silu_and_mul(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalised", [False, True])
def test_rope_and_store(seed: int, normalised: bool) -> None:
    rng, tokens, _ = shapes(seed)
    kv_heads, group, dim = 2, 3, 32
    rotary = [32, 16][seed % 2]
    heads, slots = kv_heads * group, 50
    table = torch.randn(100, rotary, generator=rng)
    positions = torch.randint(0, 100, (tokens,), generator=rng)
    loc = torch.randperm(slots, generator=rng)[:tokens]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=rng)
    weights = [torch.randn(dim if normalised else 0, generator=rng) for _ in range(2)]
    q = torch.empty(tokens, heads, dim)
    keys, values = torch.zeros(slots, kv_heads, dim), torch.zeros(slots, kv_heads, dim)
    vector.rope_and_store(
        qkv.numpy(),
        positions.numpy(),
        table.numpy(),
        weights[0].numpy(),
        weights[1].numpy(),
        np.float32(1e-6),
        loc.numpy(),
        q.numpy(),
        keys.numpy(),
        values.numpy(),
    )
    parts = torch.split(qkv.view(tokens, -1, dim), [heads, kv_heads, kv_heads], dim=1)
    expected = []
    for part, weight in zip(parts[:2], weights, strict=True):
        part = reference.rms_norm(part, weight, 1e-6) if normalised else part
        expected.append(reference.rope(part, positions, table))
    torch.testing.assert_close(q, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(keys[loc], expected[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(values[loc], parts[2])
    untouched = torch.ones(slots, dtype=torch.bool)
    untouched[loc] = False
    assert not keys[untouched].any() and not values[untouched].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_rope(seed: int) -> None:
    rng, tokens, _ = shapes(seed)
    heads, dim, rotary = 3, 32, [32, 16][seed % 2]
    table = torch.randn(100, rotary, generator=rng)
    positions = torch.randint(0, 100, (tokens,), generator=rng)
    x = torch.randn(tokens, heads * dim, generator=rng)
    out = torch.empty_like(x)
    vector.rope(x.numpy(), dim, positions.numpy(), table.numpy(), out.numpy())
    expected = reference.rope(x.view(tokens, heads, dim), positions, table)
    torch.testing.assert_close(out.view(tokens, heads, dim), expected, atol=1e-5, rtol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    x = torch.randn(9, 384)
    weight = torch.randn(384)
    whole, alone = torch.empty_like(x), torch.empty(1, 384)
    vector.rms_norm(x.numpy(), weight.numpy(), np.float32(1e-5), whole.numpy())
    for row in range(9):
        one = x[row : row + 1].contiguous()
        vector.rms_norm(one.numpy(), weight.numpy(), np.float32(1e-5), alone.numpy())
        assert torch.equal(alone[0], whole[row])
