"""What to capture for a pool of strategies: which graphs, at which batch sizes, in how much memory.

A strategy at a batch size needs three graphs, and shares each with other strategies:

    verify    of the target, by tokens to verify (plain decoding is the verification of one token)
    draft     of the drafter, by depth and topk
    extend    of the drafter, by tokens: it computes what was verified

Captured naively, every strategy has its own for every batch size. Shared, a graph is captured once.
And a batch size is captured only for strategies that can be chosen there: many tokens for few
requests, few for many (the paper's buckets: TLT, arXiv 2511.16665).

Pure: the caller passes the memory that a graph takes, see `graphs.sizes`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple

from tlt_sglang.strategy.strategies import Strategy

Kind = Literal["verify", "draft", "extend"]


class Graph(NamedTuple):
    """One captured graph."""

    kind: Kind
    shape: tuple[int, ...]
    """verify and extend: (tokens of a request,); draft: (depth, topk)."""
    batch_size: int

    @property
    def width(self) -> int:
        """Rows of a request that it computes at once, at most."""
        return self.shape[-1]


class Use(NamedTuple):
    """A strategy at a batch size."""

    strategy: Strategy
    batch_size: int


Memory = Callable[[Collection[Graph]], int]
"""Bytes that these graphs take together."""
Worth = Callable[[Strategy, int], float]
"""Expected tokens a second of a strategy at a batch size, in any unit."""


@dataclass(frozen=True)
class Plan:
    """What is captured, and what that makes possible."""

    uses: tuple[Use, ...]
    graphs: frozenset[Graph]
    bytes: int
    dropped: Mapping[Use, float]
    """Uses that the budget has no room for, and the share of the expected throughput that goes."""
    naive_bytes: int
    shared_bytes: int

    def strategies(self, batch_size: int) -> list[Strategy]:
        """Those that can run at a batch of this size: in graphs of the next larger one."""
        sizes, strategies = self._by_size
        return strategies[min(bisect_left(sizes, batch_size), len(sizes) - 1)]

    @cached_property
    def _by_size(self) -> tuple[list[int], list[list[Strategy]]]:
        """Batch sizes, ascending, and the strategies of each: looked up at every decode step."""
        found: dict[int, list[Strategy]] = {}
        for use in sorted(self.uses, key=lambda use: use.batch_size):
            found.setdefault(use.batch_size, []).append(use.strategy)
        return list(found), list(found.values())

    def captured(self) -> dict[Strategy, list[int]]:
        """The batch sizes to capture for every strategy."""
        found: dict[Strategy, list[int]] = {}
        for use in self.uses:
            found.setdefault(use.strategy, []).append(use.batch_size)
        return found


@cache
def needs(use: Use) -> tuple[Graph, ...]:
    """The graphs of a strategy at a batch size."""
    strategy, size = use
    verify = Graph("verify", (strategy.num_draft_tokens,), size)
    if strategy.drafter in ("off", "ngram"):
        return (verify,)
    extend = Graph("extend", (strategy.num_draft_tokens,), size)
    if strategy.num_steps == 1:
        return verify, extend  # the first draft comes out of the extend
    return verify, extend, Graph("draft", (strategy.num_steps, strategy.topk), size)


def plan(
    strategies: Sequence[Strategy],
    batch_sizes: Sequence[int],
    memory: Memory,
    budget: int | None,
    worth: Worth,
    *,
    max_rows: int = 512,
    max_batch: int | None = None,
) -> Plan:
    """The plan with the least loss of expected throughput that fits into `budget` bytes.

    `off` can be chosen at every batch size and is never dropped. Others can where they verify at
    most `max_rows` tokens over all requests, and at most `max_batch` requests. Raises ValueError
    if plain decoding alone does not fit.
    """
    off = Strategy("off")
    arms = tuple(dict.fromkeys([off, *strategies]))
    everywhere = [Use(arm, size) for arm in arms for size in batch_sizes]
    naive = sum(
        memory({graph for size in batch_sizes for graph in needs(Use(arm, size))}) for arm in arms
    )
    shared = memory(_graphs(everywhere))
    uses = [use for use in everywhere if _reachable(use, max_rows, max_batch)]
    shares = _time_shares(batch_sizes)
    dropped: dict[Use, float] = {}
    while budget is not None and memory(_graphs(uses)) > budget:
        graph = _cheapest(uses, memory, worth, shares)
        if graph is None:
            need = memory(_graphs(uses))
            raise ValueError(
                f"plain decoding alone takes {need / 1e9:.2f} GB of graphs, {budget / 1e9:.2f} GB "
                "are allowed"
            )
        gone = [use for use in uses if graph in needs(use)]
        uses = [use for use in uses if graph not in needs(use)]
        for use in gone:
            dropped[use] = _loss(uses, [use], worth, shares)
    graphs = _graphs(uses)
    return Plan(tuple(uses), frozenset(graphs), memory(graphs), dropped, naive, shared)


def _reachable(use: Use, max_rows: int, max_batch: int | None) -> bool:
    if use.strategy.drafter == "off":
        return True
    if max_batch is not None and use.batch_size > max_batch:
        return False
    return use.strategy.num_draft_tokens * use.batch_size <= max_rows


def _graphs(uses: Iterable[Use]) -> set[Graph]:
    return {graph for use in uses for graph in needs(use)}


def _time_shares(batch_sizes: Sequence[int]) -> dict[int, float]:
    """Of a rollout's time, at each batch size: a long tail spends as much of it at one request as
    at the doubling of any other number."""
    ordered = sorted(batch_sizes)
    weights = {
        size: (size - below) / size for below, size in zip([0, *ordered], ordered, strict=False)
    }
    total = sum(weights.values())
    return {size: weight / total for size, weight in weights.items()}


def _loss(
    left: Sequence[Use], gone: Sequence[Use], worth: Worth, shares: Mapping[int, float]
) -> float:
    """Share of the expected throughput that goes with `gone`, where `left` is left."""
    lost = 0.0
    for size in {use.batch_size for use in gone}:
        best = max(worth(use.strategy, size) for use in left if use.batch_size == size)
        before = max(worth(use.strategy, size) for use in gone if use.batch_size == size)
        lost += shares[size] * max(0.0, 1 - best / before)
    return lost


def _cheapest(
    uses: Sequence[Use], memory: Memory, worth: Worth, shares: Mapping[int, float]
) -> Graph | None:
    """The graph to give up next: least loss for a byte; None if only plain decoding is left."""
    plain = _graphs(use for use in uses if use.strategy.drafter == "off")
    whole = memory(_graphs(uses))
    best: tuple[float, int, Graph] | None = None
    for graph in sorted(_graphs(uses) - plain):
        gone = [use for use in uses if graph in needs(use)]
        left = [use for use in uses if graph not in needs(use)]
        freed = whole - memory(_graphs(left))
        if freed <= 0:
            continue
        lost = _loss(left, gone, worth, shares) / freed
        if best is None or (lost, -freed) < best[:2]:
            best = lost, -freed, graph
    return best[2] if best else None
