"""Automata without memory, and in how many ways they can match the same text.

A state is a character that the pattern can match, with the set of characters that it stands for;
an edge leads from a state to one that can follow it. Two edges between the same states are two ways
to the same match. Runs anywhere; pure.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ANY = (1 << 256) - 1
"""The set of all characters: a bit for each up to U+00FE, and one for all others."""
MAX_STATES = 600
MAX_PAIRS = 100_000
MAX_STEPS = 1_000_000


class TooLarge(Exception):
    """The automaton has too many states, or pairs of states, to be examined."""


@dataclass(frozen=True)
class Fragment:
    """A part of a pattern: the states that it can begin and end with, each once for every way."""

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    empty: int = 1
    """The number of ways to match nothing."""


class Automaton:
    """States and edges, added fragment by fragment."""

    def __init__(self) -> None:
        self.characters: list[int] = []
        self.edges: list[list[int]] = []
        self.empty_choices = 0
        """Places where nothing can be matched in several ways."""
        self._beginnings: list[tuple[int, ...]] = []

    # -- building it -------------------------------------------------------------------------------

    def nothing(self) -> Fragment:
        """Return a fragment that matches nothing, in one way."""
        return Fragment()

    def character(self, characters: int) -> Fragment:
        """Return a fragment that matches one of a set of characters."""
        if len(self.characters) >= MAX_STATES:
            raise TooLarge
        self.characters.append(characters)
        self.edges.append([])
        state = (len(self.characters) - 1,)
        return Fragment(state, state, 0)

    def then(self, one: Fragment, other: Fragment) -> Fragment:
        """Return a fragment that matches `one` and then `other`."""
        self._connect(one.last, other.first)
        return Fragment(
            _twice(one.first + other.first * min(one.empty, 2)),
            _twice(other.last + one.last * min(other.empty, 2)),
            min(one.empty * other.empty, 2),
        )

    def either(self, fragments: Sequence[Fragment]) -> Fragment:
        """Return a fragment that matches one of several."""
        self.empty_choices += sum(each.empty for each in fragments) > 1
        return Fragment(
            _twice(tuple(state for each in fragments for state in each.first)),
            _twice(tuple(state for each in fragments for state in each.last)),
            min(sum(each.empty for each in fragments), 2),
        )

    def loop(self, inner: Fragment, *, at_least_once: bool) -> Fragment:
        """Return a fragment that matches `inner` again and again.

        Python leaves a loop at a match of nothing, so those are not repeated.
        """
        self._connect(inner.last, inner.first)
        return Fragment(inner.first, inner.last, min(inner.empty + (not at_least_once), 1))

    def finish(self, fragment: Fragment) -> None:
        """Take a whole pattern, or one that is searched by itself inside another."""
        self._beginnings.append(fragment.first)

    def _connect(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if len(sources) * len(targets) > MAX_PAIRS:
            raise TooLarge
        for source in sources:
            self.edges[source] += targets

    # -- examining it ------------------------------------------------------------------------------

    def is_exponential(self) -> bool:
        """Return True if some text has two ways from a state back to it."""
        return any(self._is_ambiguous(component) for component in self.loops)

    @functools.cached_property
    def loops(self) -> list[set[int]]:
        """The sets of states from each of which all others of the set can be reached."""
        reachable = self._reachable
        loops: list[set[int]] = []
        for state, targets in enumerate(reachable):
            if state in targets and not any(state in loop for loop in loops):
                loops.append({each for each in targets if state in reachable[each]})
        return loops

    def loops_in_a_row(self) -> int:
        """Return the most loops that follow each other and can match the same character."""
        loops = self.loops
        counts = [1] * len(loops)
        masks = [self._union(loop) for loop in loops]
        after = [self._reachable[next(iter(loop))] - loop for loop in loops]
        # A loop comes after those from which it can be reached.
        for index in sorted(range(len(loops)), key=lambda i: len(after[i])):
            for other, loop in enumerate(loops):
                if loop & after[index] and masks[index] & masks[other]:
                    counts[index] = max(counts[index], 1 + counts[other])
        return max(counts, default=0)

    def has_more_ways(self, limit: int) -> bool:
        """Return whether a text may have more than so many ways, each loop taken as one character.

        Two ways of one text are a pair of paths whose states have a character in common at every
        step. So a text with n ways has n * n such pairs, and they are counted.
        """
        loops = self.loops
        node = list(range(len(self.edges)))
        for loop in loops:
            for state in loop:
                node[state] = min(loop)
        masks = dict(enumerate(self.characters))
        after = {s: Counter(node[t] for t in edges) for s, edges in enumerate(self.edges)}
        for loop in loops:
            masks[min(loop)] = self._union(loop)
            outside = {node[t] for s in loop for t in self.edges[s]} - {min(loop)}
            after[min(loop)] = Counter(outside)
        order = {state: len(self._reachable[state] | {state}) for state in set(node)}
        pairs: dict[int, Counter[tuple[int, int]]] = defaultdict(Counter)
        total = visited = 0
        steps = [(Counter(node[s] for s in first),) * 2 + (1,) for first in self._beginnings]
        while steps or pairs:
            for ones, others, count in steps:
                visited += len(ones) * len(others)
                for (one, n), (other, m) in itertools.product(ones.items(), others.items()):
                    if masks[one] & masks[other]:
                        total += n * m * count
                        pairs[order[one] + order[other]][one, other] += n * m * count
                if total > limit * limit:
                    return True
                if visited > MAX_STEPS:
                    raise TooLarge
            # Every step leads to states from which fewer can be reached.
            nearest = pairs.pop(max(pairs)) if pairs else {}
            steps = [(after[one], after[other], n) for (one, other), n in nearest.items()]
        return False

    def _is_ambiguous(self, loop: set[int]) -> bool:
        edges = {state: [each for each in self.edges[state] if each in loop] for state in loop}
        if any(len(targets) != len(set(targets)) for targets in edges.values()):
            return True
        # From one state, two ways with the same text part, and meet again.
        pairs = {
            pair for state in loop for pair in self._steps(edges, state, state) if _differ(pair)
        }
        pending = list(pairs)
        while pending:
            for pair in self._steps(edges, *pending.pop()):
                if not _differ(pair):
                    return True
                if pair not in pairs:
                    pairs.add(pair)
                    pending.append(pair)
            if len(pairs) > MAX_PAIRS:
                raise TooLarge
        return False

    def _steps(
        self, edges: dict[int, list[int]], one: int, other: int
    ) -> Iterator[tuple[int, int]]:
        """Yield the pairs of states that follow a pair with the same character."""
        for first in edges[one]:
            for second in edges[other]:
                if self.characters[first] & self.characters[second]:
                    yield (first, second) if first <= second else (second, first)

    @functools.cached_property
    def _reachable(self) -> list[set[int]]:
        """The states that can follow each state, once the automaton is built."""
        return [self._after(state) for state in range(len(self.edges))]

    def _after(self, state: int) -> set[int]:
        reachable: set[int] = set()
        pending = list(self.edges[state])
        while pending:
            each = pending.pop()
            if each not in reachable:
                reachable.add(each)
                pending += self.edges[each]
        return reachable

    def _union(self, states: set[int]) -> int:
        mask = 0
        for state in states:
            mask |= self.characters[state]
        return mask


def _differ(pair: tuple[int, int]) -> bool:
    return pair[0] != pair[1]


def _twice(states: tuple[int, ...]) -> tuple[int, ...]:
    """Return the states, each at most twice: more ways make no difference."""
    if len(states) == len(set(states)):
        return states
    once = tuple(dict.fromkeys(states))
    return once + tuple(state for state in once if states.count(state) > 1)
