"""The attention kernel in every mode against plain attention, and its exactness across modes."""

from __future__ import annotations

import pytest
import torch

from tests.support import reference_kernels as reference
from tlt_sglang.cpu.kernels import attention


class Pool:
    """A random KV pool with a request table, and queries for it."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.kv_heads = self.pick(1, 4)
        self.heads = self.kv_heads * self.pick(1, 4)
        self.dim = [8, 16, 40, 64, 128][self.pick(0, 4)]
        self.requests, self.columns, slots = 5, 200, 2000
        self.keys = self.normal(slots, self.kv_heads, self.dim)
        self.values = self.normal(slots, self.kv_heads, self.dim)
        order = torch.randperm(slots, generator=self.rng)[: self.requests * self.columns]
        self.table = order.view(self.requests, self.columns).to(torch.int32)
        self.rows = torch.randperm(self.requests, generator=self.rng)[: self.pick(1, 4)]
        self.scale = self.dim**-0.5

    def pick(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.rng))

    def lengths(self, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (len(self.rows),), generator=self.rng)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def queries(self, count: int) -> torch.Tensor:
        return self.normal(count, self.heads, self.dim)

    def run(self, plan: attention.AttentionPlan, q: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(q, torch.nan)
        attention.attend(plan, q, self.keys, self.values, self.scale, out)
        return out

    def check(self, plan: attention.AttentionPlan, q: torch.Tensor, slots: list[list[int]]) -> None:
        expected = reference.attend(q, self.keys, self.values, slots, self.scale)
        torch.testing.assert_close(self.run(plan, q), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("seed", range(12))
def test_decode(seed: int) -> None:
    pool = Pool(seed)
    lens = pool.lengths(1, 150)
    plan = attention.plan_decode(pool.table, pool.rows, lens)
    slots = [pool.table[r, :n].tolist() for r, n in zip(pool.rows, lens, strict=True)]
    pool.check(plan, pool.queries(len(slots)), slots)


@pytest.mark.parametrize("seed", range(12))
def test_extend_is_causal(seed: int) -> None:
    pool = Pool(seed)
    prefix, extend = pool.lengths(0, 90), pool.lengths(1, 30).to(torch.int32)
    plan = attention.plan_extend(pool.table, pool.rows, prefix, extend)
    slots = [
        pool.table[r, : p + j + 1].tolist()
        for r, p, e in zip(pool.rows, prefix, extend, strict=True)
        for j in range(int(e))
    ]
    pool.check(plan, pool.queries(len(slots)), slots)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_chain_is_an_extend_of_one_width(width: int) -> None:
    pool = Pool(width)
    prefix = pool.lengths(0, 90)
    plan = attention.plan_chain(pool.table, pool.rows, prefix, width)
    expected = attention.plan_extend(
        pool.table, pool.rows, prefix, torch.full((len(prefix),), width)
    )
    assert torch.equal(plan.rows, expected.rows) and torch.equal(plan.visible, expected.visible)
    q = pool.queries(len(plan.rows))
    assert torch.equal(pool.run(plan, q), pool.run(expected, q))


@pytest.mark.parametrize("seed", range(12))
def test_tree(seed: int) -> None:
    pool = Pool(seed)
    prefix, width = pool.lengths(1, 90), pool.pick(2, 9)
    mask = torch.rand(len(pool.rows), width, width, generator=pool.rng) < 0.5
    mask |= torch.eye(width, dtype=torch.bool)
    mask &= torch.ones(width, width, dtype=torch.bool).tril()
    plan = attention.plan_tree(pool.table, pool.rows, prefix, mask)
    slots = []
    for i, (r, p) in enumerate(zip(pool.rows.tolist(), prefix.tolist(), strict=True)):
        for j in range(width):
            candidates = [p + c for c in range(width) if mask[i, j, c]]
            slots.append(pool.table[r, list(range(p)) + candidates].tolist())
    pool.check(plan, pool.queries(len(slots)), slots)


@pytest.mark.parametrize("seed", range(12))
def test_branches(seed: int) -> None:
    pool = Pool(seed)
    prefix, topk, steps = pool.lengths(1, 90), pool.pick(1, 4), pool.pick(2, 5)
    step = pool.pick(0, steps - 2)
    plan = attention.plan_branches(pool.table, pool.rows, prefix, topk, steps, step)
    slots = []
    for r, p in zip(pool.rows.tolist(), prefix.tolist(), strict=True):
        for b in range(topk):
            own = [p + b * steps + s for s in range(step + 1)]
            slots.append(pool.table[r, list(range(p)) + own].tolist())
    pool.check(plan, pool.queries(len(slots)), slots)


@pytest.mark.parametrize("seed", range(6))
def test_a_verified_token_is_bitwise_a_decoded_one(seed: int) -> None:
    """Chain, tree and plain decode give the very same numbers for the same token."""
    pool = Pool(seed)
    row, prefix, width = pool.rows[:1], torch.tensor([120]), 6
    q = pool.queries(width)
    chain = attention.plan_extend(pool.table, row, prefix, torch.tensor([width]))
    mask = torch.ones(1, width, width, dtype=torch.bool).tril()
    tree = attention.plan_tree(pool.table, row, prefix, mask)
    verified = pool.run(chain, q)
    assert torch.equal(verified, pool.run(tree, q))
    for j in range(width):
        plain = attention.plan_decode(pool.table, row, prefix + j + 1)
        assert torch.equal(pool.run(plain, q[j : j + 1].contiguous())[0], verified[j])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 8, 40])
def test_queries_that_read_together_give_what_each_gives_alone(width: int, seed: int) -> None:
    """A group reads blocks of slots; a query alone reads all of them in one go."""
    pool = Pool(seed)
    prefix = pool.lengths(0, 150)
    plan = attention.plan_chain(pool.table, pool.rows, prefix, width)
    groups = -(-width // attention.TOGETHER) * len(pool.rows)
    assert plan.firsts[groups] == width * len(pool.rows)
    q = pool.queries(len(plan.rows))
    together = pool.run(plan, q)
    alone = [
        pool.run(attention.plan_decode(pool.table, row[None], visible[None]), query[None])[0]
        for row, visible, query in zip(plan.rows, plan.visible, q, strict=True)
    ]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("requests", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 5])
def test_alone_and_on_the_team_agree(
    monkeypatch: pytest.MonkeyPatch, requests: int, width: int
) -> None:
    pool = Pool(3)
    rows = torch.arange(requests)
    plan = attention.plan_chain(pool.table, rows, torch.randint(50, 150, (requests,)), width)
    q = pool.queries(requests * width)
    results = []
    for threshold in (0, 10**9):
        monkeypatch.setattr(attention, "PARALLEL_SIZE", threshold)
        results.append(pool.run(plan, q))
    assert torch.equal(*results)


def test_large_scores_do_not_overflow() -> None:
    pool = Pool(1)
    plan = attention.plan_decode(pool.table, pool.rows, pool.lengths(20, 40))
    q = pool.queries(len(pool.rows)) * 1e4
    assert torch.isfinite(pool.run(plan, q)).all()
