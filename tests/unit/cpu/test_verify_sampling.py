"""Sampling verification emits the target's distribution, and truncation the plain sampler's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import reference_kernels as reference
from tlt_sglang.cpu import kernels

LARGEST_COIN = 1 - 2**-24
sample_tree: Callable[..., None] = kernels.tree_speculative_sampling_target_only
truncate: Callable[..., torch.Tensor] = kernels.truncate_probs
truncate_plainly: Callable[..., torch.Tensor] = reference.truncate_probs


@dataclass(frozen=True)
class Tree:
    """One draft tree; siblings in ascending order."""

    parents: list[int]
    tokens: list[int]

    def links(self, batch: int) -> list[torch.Tensor]:
        n = len(self.parents)
        child, sibling = torch.full((n,), -1), torch.full((n,), -1)
        for node in range(n - 1, 0, -1):
            sibling[node] = child[self.parents[node]]
            child[self.parents[node]] = node
        rows = torch.arange(batch * n).view(batch, n)
        return [rows, child.repeat(batch, 1), sibling.repeat(batch, 1)]

    def path(self, node: int) -> list[int]:
        return [] if node == 0 else [*self.path(self.parents[node]), node]


def random_tree(gen: np.random.Generator, n: int, vocab: int, depth: int, twins: bool) -> Tree:
    parents, tokens = [-1], [0]
    heights = [0]
    while len(parents) < n:
        parent = int(gen.integers(len(parents)))
        taken = [t for p, t in zip(parents, tokens, strict=True) if p == parent]
        free = [t for t in range(vocab) if twins or t not in taken]
        if heights[parent] < depth and free:
            parents.append(parent)
            tokens.append(int(gen.choice(free)))
            heights.append(heights[parent] + 1)
    return Tree(parents, tokens)


def verified(
    tree: Tree,
    target: torch.Tensor,
    coins: torch.Tensor,
    final: torch.Tensor,
    width: int,
    **limits: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B, width] and how many of them each request emits [B]; the tree and the
    ``[n, vocab]`` target are the same for all."""
    batch, n = coins.shape
    predicts, accepted = torch.full((batch * n,), -7).int(), torch.zeros(batch).int()
    index = torch.full((batch, width), -1).int()
    sample_tree(
        predicts=predicts,
        accept_index=index,
        accept_token_num=accepted,
        candidates=torch.tensor(tree.tokens).repeat(batch, 1),
        retrive_index=(links := tree.links(batch))[0],
        retrive_next_token=links[1],
        retrive_next_sibling=links[2],
        uniform_samples=coins,
        uniform_samples_for_final_sampling=final,
        target_probs=target.expand(batch, *target.shape),
        draft_probs=None,
        **limits,
    )
    return predicts[index.long()], accepted + 1


def verify(*args: Any, **kwargs: Any) -> list[list[int]]:
    """Emitted tokens of each request; arguments as of `verified`."""
    tokens, counts = (outputs.tolist() for outputs in verified(*args, **kwargs))
    return [row[:count] for row, count in zip(tokens, counts, strict=True)]


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_exactly_the_targets_distribution(seed: int, twins: bool) -> None:
    """Integrates over all coins, without any tolerance.

    Probabilities are multiples of 1/cells, so the outcome is constant within each cell of a
    grid of coins: counting the cells' midpoints is the integral. One coin a depth is enough,
    since the nodes of a depth never use theirs together.
    """
    gen = np.random.default_rng(seed)
    depth, cells = ((1, 8), (2, 6), (3, 4))[seed % 3]
    vocab, n = int(gen.integers(2, 6)), int(gen.integers(2, 7))
    tree = random_tree(gen, min(n, vocab + 1), vocab, depth, twins)
    n = len(tree.parents)
    target = gen.multinomial(cells, np.ones(vocab) / vocab, size=n).astype(np.float64) / cells
    width = depth + 1 - int(gen.integers(0, 2))

    finals = math.lcm(*range(1, cells + 1))
    axes = [(np.arange(cells) + 0.5) / cells] * depth + [(np.arange(finals) + 0.5) / finals]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")])
    heights = np.array([len(tree.path(node)) for node in range(n)])
    coins = torch.tensor(grid[np.minimum(heights, depth - 1)].T, dtype=torch.float32)
    emitted = verify(tree, torch.tensor(target).float(), coins, torch.tensor(grid[-1]), width)

    checked = 0
    for node in range(n):
        path = [tree.tokens[step] for step in tree.path(node)]
        if len(path) >= width or any(is_twin(tree, step) for step in tree.path(node)):
            continue
        reach = 1.0
        for step in tree.path(node):
            reach *= target[tree.parents[step], tree.tokens[step]]
        for token in range(vocab):
            prefix = [*path, token]
            count = sum(tokens[: len(prefix)] == prefix for tokens in emitted)
            assert count == pytest.approx(reach * target[node, token] * len(emitted), abs=1e-6)
            checked += 1
    assert checked >= vocab


def is_twin(tree: Tree, node: int) -> bool:
    """Return whether an earlier sibling drafts the same token: verification never gets here."""
    siblings = [i for i in range(node) if tree.parents[i] == tree.parents[node]]
    return tree.tokens[node] in [tree.tokens[i] for i in siblings]


@pytest.mark.parametrize("seed", range(3))
def test_sampled_frequencies(seed: int) -> None:
    """Chi-square over the first two tokens of 200,000 rounds, for any float probabilities."""
    gen, rounds, vocab = np.random.default_rng(100 + seed), 200_000, 5
    tree = random_tree(gen, 6, vocab, 2, twins=False)
    target = gen.dirichlet(np.ones(vocab), size=6).astype(np.float32)
    coins = torch.tensor(gen.random((rounds, 6), dtype=np.float32))
    final = torch.tensor(gen.random(rounds, dtype=np.float32))
    tokens, counts = verified(tree, torch.tensor(target), coins, final, 3)
    for node in [0, *(i for i in range(6) if tree.parents[i] == 0)]:
        path = [tree.tokens[step] for step in tree.path(node)]
        through = (tokens[:, : len(path)] == torch.tensor(path)).all(1) & (counts > len(path))
        followed = tokens[through, len(path)].numpy()
        observed = np.bincount(followed, minlength=vocab)
        expected = target[node].astype(np.float64) / target[node].sum(dtype=np.float64)
        expected *= len(followed)
        chi_square = torch.tensor(((observed - expected) ** 2 / expected).sum())
        freedom = torch.tensor((vocab - 1) / 2, dtype=torch.float64)
        assert torch.special.gammaincc(freedom, chi_square / 2) > 1e-4


@pytest.mark.parametrize("seed", range(20))
def test_reference(seed: int) -> None:
    """Thresholds below one and draft probabilities, too."""
    gen, torch_gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch, vocab, n = int(gen.integers(1, 5)), int(gen.integers(3, 700)), int(gen.integers(1, 12))
    tree = random_tree(gen, n, min(vocab, 6), 4, twins=True)
    target = torch.rand(batch, n, vocab, generator=torch_gen) ** 8
    target[..., :6] += 0.2 * vocab**0.5
    target /= target.sum(-1, keepdim=True)
    draft = torch.rand(batch, n, vocab, generator=torch_gen) * target * int(gen.integers(0, 2))
    coins = torch.rand(batch, n, generator=torch_gen)
    final = torch.rand(batch, generator=torch_gen)
    thresholds = [(1.0, 1.0), (0.15, 1.0), (1.0, 0.6)][seed % 3]
    width = int(gen.integers(1, 6))
    results = []
    for module in (kernels, reference):
        outputs = [torch.zeros(batch * n).int(), torch.full((batch, width), -1).int()]
        outputs.append(torch.zeros(batch).int())
        module.tree_speculative_sampling_target_only(
            *outputs,
            torch.tensor(tree.tokens).repeat(batch, 1),
            *tree.links(batch),
            coins,
            final,
            target,
            draft,
            *thresholds,
        )
        results.append(outputs)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("scale", [0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 1.5])
@pytest.mark.parametrize("coin", [0.0, 0.5, LARGEST_COIN])
def test_never_a_token_of_probability_zero(coin: float, scale: float) -> None:
    gen = np.random.default_rng(7)
    for _ in range(40):
        vocab, n = int(gen.integers(2, 600)), int(gen.integers(1, 8))
        tree = random_tree(gen, n, vocab, 3, twins=True)
        target = gen.dirichlet(np.full(vocab, 0.1), size=n) * (gen.random((n, vocab)) < 0.3)
        target[:, 0] += target.sum(-1) == 0
        for node in range(1, n):
            if gen.random() < 0.5:
                target[tree.parents[node]] = np.eye(vocab)[tree.tokens[node]]
        rows = torch.tensor(target / target.sum(-1, keepdims=True) * scale).float()
        coins, final = torch.full((1, n), coin), torch.tensor([coin])
        (tokens,) = verify(tree, rows, coins, final, 4)
        node = 0
        for token in tokens:
            assert rows[node, token] > 0
            children = [i for i in range(n) if tree.parents[i] == node]
            node = next((i for i in children if tree.tokens[i] == token), -1)


def test_children_that_hold_all_the_mass() -> None:
    """Rounding may leave the coin behind the last child: that child's token is emitted."""
    tree = Tree([-1, 0, 0], [0, 1, 2])
    target = torch.tensor([[0.0, 0.5, 0.4999]] * 3)
    coins, final = torch.full((1, 3), LARGEST_COIN), torch.tensor([0.5])
    assert verify(tree, target, coins, final, 2) == [[2]]


def test_draw_over_a_real_vocabulary() -> None:
    gen, vocab = np.random.default_rng(3), 49_152
    target = torch.tensor(gen.dirichlet(np.full(vocab, 0.05), size=1)).float()
    final = torch.tensor(gen.random(64, dtype=np.float32))
    emitted = verify(Tree([-1], [0]), target, torch.zeros(64, 1), final, 1)
    mass = target[0].double().cumsum(0)
    for (token,), coin in zip(emitted, final.double(), strict=True):
        goal = coin * mass[-1]
        assert mass[token] - target[0, token] - 1e-9 <= goal < mass[token] + 1e-9


@pytest.mark.parametrize("seed", range(30))
def test_truncation(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    rows, vocab = 6, int(torch.randint(1, 3000, (), generator=gen))
    probs = torch.softmax(torch.randn(rows, vocab, generator=gen) * (seed % 5), -1)
    if seed % 3 == 0:
        probs = (probs * 64 * vocab).round().clamp(min=1)  # many ties
        probs /= probs.sum(-1, keepdim=True)
    top_k = torch.randint(1, vocab + 2, (rows,), generator=gen).int()
    top_k[0] = 1 << 30
    top_p = torch.rand(rows, generator=gen).clamp(min=1e-3)
    top_p[1] = 1.0
    min_p = torch.rand(rows, generator=gen) ** 4
    min_p[2] = 0.0
    needs = [bool(seed & 1), bool(seed & 2), bool(seed & 4)]
    plain = truncate_plainly(probs, top_k, top_p, min_p, *needs)
    mine = truncate(probs.clone(), top_k, top_p, min_p, *needs)
    assert torch.equal(mine > 0, plain > 0)
    torch.testing.assert_close(mine, plain)
    off = torch.zeros(rows)
    singles = [
        (kernels.top_k_renorm_prob, top_k, [True, False, False]),
        (kernels.top_p_renorm_prob, top_p, [False, True, False]),
        (kernels.min_p_renorm_prob, min_p, [False, False, True]),
    ]
    before = probs.clone()
    for function, limits, needs in singles:
        limit = [limits if need else off for need in needs]
        expected = truncate_plainly(probs, *limit, *needs)
        torch.testing.assert_close(function(probs, limits), expected)
    assert torch.equal(probs, before)


@pytest.mark.parametrize("seed", range(5))
def test_truncating_visited_rows_only_emits_the_same(seed: int) -> None:
    gen, torch_gen = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tree, batch = random_tree(gen, 8, 6, 3, twins=False), 50
    target = torch.softmax(3 * torch.randn(8, 40, generator=torch_gen), -1)
    coins, final = torch.rand(batch, 8, generator=torch_gen), torch.rand(batch, generator=torch_gen)
    limits = {
        "top_ks": torch.tensor([5]),
        "top_ps": torch.tensor([0.8]),
        "min_ps": torch.tensor([0.1]),
    }
    truncated = truncate(target.clone(), *limits.values(), True, True, True)
    assert not torch.equal(truncated, target)
    everyone = {name: limit.repeat(batch) for name, limit in limits.items()}
    lazily = verify(tree, target, coins, final, 4, **everyone)
    assert lazily == verify(tree, truncated, coins, final, 4)


def test_truncation_limits_a_request_at_a_time() -> None:
    probs = torch.softmax(torch.randn(6, 50), -1)
    limits = [torch.tensor([3, 9]), torch.tensor([0.5, 0.9]), torch.tensor([0.0, 0.2])]
    repeated = [limit.repeat_interleave(3) for limit in limits]
    needs = (True, True, True)
    mine = truncate(probs.clone(), *limits, *needs)
    assert torch.equal(mine, truncate(probs.clone(), *repeated, *needs))
    with pytest.raises(ValueError, match="4 limits"):
        kernels.top_k_renorm_prob(probs, torch.ones(4))


def test_truncation_leaves_unlimited_rows_alone() -> None:
    probs = torch.softmax(torch.randn(3, 50), -1) * 0.999
    before, top_k = probs.clone(), torch.tensor([1 << 30, 1, 50])
    one, zero = torch.ones(3), torch.zeros(3)
    assert truncate(probs, top_k, one, zero, False, False, False) is probs
    assert torch.equal(probs, before)
    truncate(probs, top_k, one, zero, True, True, True)
    assert torch.equal(probs[[0, 2]], before[[0, 2]])
    assert probs[1].max() == 1 and probs[1].argmax() == before[1].argmax()
