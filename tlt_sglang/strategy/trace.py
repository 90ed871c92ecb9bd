"""A policy's conversation, written down, and held again: the same calls lead to the same choices.

A line of JSON for each call, in order: `["choose", batch size, endings, strategy]` or `["observe",
strategy, batch size, accepted drafts of each request, seconds, endings, repeated]`, see
`Observation`. Pure but for what `write` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from tlt_sglang.strategy.arms import Strategy, parse
from tlt_sglang.strategy.policy import Observation, Policy


class Recorded:
    """`policy`, of which every call is written."""

    def __init__(self, policy: Policy, write: Callable[[str], object]) -> None:
        self._policy, self._write = policy, write

    def choose(self, batch_size: int, endings: Sequence[int] = ()) -> Strategy:
        """What `policy` chooses."""
        chosen = self._policy.choose(batch_size, endings)
        self._write(json.dumps(["choose", batch_size, list(endings), str(chosen)]) + "\n")
        return chosen

    def observe(self, seen: Observation) -> None:
        """Tell `policy`."""
        accepted = list(seen.accepted)
        told = ["observe", str(seen.strategy), seen.batch_size, accepted, seen.seconds]
        told += [list(seen.endings), list(seen.repeated)]
        self._write(json.dumps(told) + "\n")
        self._policy.observe(seen)


def replay(policy: Policy, lines: Iterable[str]) -> Iterator[tuple[Strategy, Strategy]]:
    """(chosen then, chosen now) of every choice of a trace, by a policy in its first state.

    A last line that is cut off, as of an engine that was killed, ends it. Raises ValueError for
    anything else that is no trace.
    """
    for line in lines:
        if not line.endswith("\n"):
            return
        try:
            call, *rest = json.loads(line)
            if call == "choose":
                batch_size, endings, chosen = rest
                yield parse(chosen), policy.choose(batch_size, endings)
            elif call == "observe":
                strategy, *figures = rest
                policy.observe(Observation(parse(strategy), *figures))
            else:
                raise ValueError(call)
        except (TypeError, ValueError) as error:
            raise ValueError(f"no line of a trace: {line.strip()[:100]}") from error
