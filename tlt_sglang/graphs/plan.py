"""The capture plan: which CUDA graphs a pool of strategies needs, and which fit into a budget.

A strategy at a batch size needs up to three graphs:

    verify    of the target (plain decoding is the verification of one token)
    draft     of the drafter
    extend    of the drafter: it computes what was verified

Captured naively, every strategy has its own for every batch size. N-grams verify from the graphs of
a chain as long as theirs if there is one. And a batch size is captured only for strategies that can
be chosen there: many tokens for few requests, few for many (the paper's buckets: TLT, arXiv
2511.16665).

Pure: it captures nothing, and the caller says what graphs cost, see `Memory`. Runs in the scheduler
process and in `tlt plan`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple

from tlt_sglang.strategy.strategies import Strategy, depth_of

Kind = Literal["verify", "draft", "extend"]


class Graph(NamedTuple):
    """One captured graph."""

    kind: Kind
    shape: tuple[int, int, int]
    """(depth, topk, tokens of a request)."""
    batch_size: int

    @property
    def width(self) -> int:
        """The most rows of a request that it computes at once."""
        _, topk, tokens = self.shape
        return topk if self.kind == "draft" else tokens


class Use(NamedTuple):
    """A strategy at a batch size."""

    strategy: Strategy
    batch_size: int


Memory = Callable[[Collection[Graph]], int]
"""Bytes that graphs take together."""
ExpectedThroughput = Callable[[Strategy, int], float]
"""Expected tokens a second of a strategy at a batch size, in any unit."""


@dataclass(frozen=True)
class CapturePlan:
    """The graphs to capture, and the strategies that can run with them."""

    uses: tuple[Use, ...]
    graphs: frozenset[Graph]
    bytes: int
    dropped: Mapping[Use, float]
    """Uses that the budget has no room for: the share of the expected throughput that is lost."""
    naive_bytes: int
    shared_bytes: int

    def strategies(self, batch_size: int) -> list[Strategy]:
        """Return the strategies of a batch of this size: those of the next larger captured one."""
        sizes, strategies = self._by_size
        return strategies[min(bisect_left(sizes, batch_size), len(sizes) - 1)]

    @cached_property
    def _by_size(self) -> tuple[list[int], list[list[Strategy]]]:
        """Batch sizes in ascending order, and the strategies of each; read at every step."""
        by_size: dict[int, list[Strategy]] = {}
        for use in sorted(self.uses, key=lambda use: use.batch_size):
            by_size.setdefault(use.batch_size, []).append(use.strategy)
        return list(by_size), list(by_size.values())

    def captured(self) -> dict[Strategy, list[int]]:
        """Return the batch sizes to capture for every strategy."""
        sizes: dict[Strategy, list[int]] = {}
        for use in self.uses:
            sizes.setdefault(use.strategy, []).append(use.batch_size)
        return sizes


@cache
def needs(use: Use) -> tuple[Graph, ...]:
    """Return the graphs of a strategy at a batch size."""
    strategy, size = use
    shape = depth_of(strategy), strategy.topk, strategy.num_draft_tokens
    verify, extend = Graph("verify", shape, size), Graph("extend", shape, size)
    if strategy.drafter in ("off", "ngram"):
        return (verify,)
    if strategy.num_steps == 1:
        return verify, extend  # the first draft comes out of the extend
    return verify, extend, Graph("draft", shape, size)


def plan(
    pool: Sequence[Strategy],
    batch_sizes: Sequence[int],
    memory: Memory,
    budget: int | None,
    throughput: ExpectedThroughput,
    *,
    max_rows: int = 512,
    max_batch: int | None = None,
) -> CapturePlan:
    """Return the plan with the least loss of expected throughput that fits into `budget` bytes.

    `off` is allowed at every batch size and is never dropped. Other strategies are allowed where
    they verify at most `max_rows` tokens over all requests, and at most `max_batch` requests.
    Raises ValueError if plain decoding alone does not fit.
    """
    # Two figures for comparison: every strategy with its own graphs, and all graphs shared.
    strategies = tuple(dict.fromkeys([Strategy("off"), *pool]))
    everything = [Use(strategy, size) for strategy in strategies for size in batch_sizes]
    naive = sum(
        memory({graph for use in everything if use.strategy == strategy for graph in needs(use)})
        for strategy in strategies
    )
    shared = memory(_graphs(everything))
    # Drop the graph with the least loss for its bytes until the rest fits.
    uses = [use for use in everything if _is_allowed(use, max_rows, max_batch)]
    shares = _time_shares(batch_sizes)
    dropped: dict[Use, float] = {}
    while budget is not None and memory(_graphs(uses)) > budget:
        graph = _cheapest_graph(uses, memory, throughput, shares)
        if graph is None:
            need = memory(_graphs(uses))
            raise ValueError(
                f"plain decoding alone takes {need / 1e9:.2f} GB of graphs, {budget / 1e9:.2f} GB "
                "are allowed"
            )
        without, uses = _split(uses, graph)
        dropped |= {use: _loss(uses, [use], throughput, shares) for use in without}
    graphs = _graphs(uses)
    return CapturePlan(tuple(uses), frozenset(graphs), memory(graphs), dropped, naive, shared)


def _is_allowed(use: Use, max_rows: int, max_batch: int | None) -> bool:
    if use.strategy.drafter == "off":
        return True
    if max_batch is not None and use.batch_size > max_batch:
        return False
    return use.strategy.num_draft_tokens * use.batch_size <= max_rows


def _graphs(uses: Iterable[Use]) -> set[Graph]:
    return {graph for use in uses for graph in needs(use)}


def _split(uses: Sequence[Use], graph: Graph) -> tuple[list[Use], list[Use]]:
    """Return the uses that need `graph`, and the others."""
    with_graph = [use for use in uses if graph in needs(use)]
    return with_graph, [use for use in uses if graph not in needs(use)]


def _time_shares(batch_sizes: Sequence[int]) -> dict[int, float]:
    """Return the share of a rollout's time that is spent at each batch size.

    A long tail spends as much time at one request as at the doubling of any other number.
    """
    ordered = sorted(batch_sizes)
    weights = {
        size: (size - below) / size for below, size in zip([0, *ordered], ordered, strict=False)
    }
    total = sum(weights.values())
    return {size: weight / total for size, weight in weights.items()}


def _loss(
    kept: Sequence[Use],
    without: Sequence[Use],
    throughput: ExpectedThroughput,
    shares: Mapping[int, float],
) -> float:
    """Return the share of the expected throughput that goes with `without` if `kept` remains."""
    lost = 0.0
    for size in {use.batch_size for use in without}:
        best = max(throughput(use.strategy, size) for use in kept if use.batch_size == size)
        before = max(throughput(use.strategy, size) for use in without if use.batch_size == size)
        lost += shares[size] * max(0.0, 1 - best / before)
    return lost


def _cheapest_graph(
    uses: Sequence[Use],
    memory: Memory,
    throughput: ExpectedThroughput,
    shares: Mapping[int, float],
) -> Graph | None:
    """Return the graph with the least loss for a byte, or None if only plain decoding remains."""
    plain = _graphs(use for use in uses if use.strategy.drafter == "off")
    total = memory(_graphs(uses))
    best: tuple[float, int, Graph] | None = None
    for graph in sorted(_graphs(uses) - plain):
        without, kept = _split(uses, graph)
        freed = total - memory(_graphs(kept))
        if freed <= 0:
            continue
        lost = _loss(kept, without, throughput, shares) / freed
        if best is None or (lost, -freed) < best[:2]:
            best = lost, -freed, graph
    return best[2] if best else None
