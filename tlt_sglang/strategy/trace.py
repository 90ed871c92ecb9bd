"""Traces of a policy: a line of JSON for each of its calls, and their replay.

Lines are `["choose", batch size, match lengths, strategy, sampled]` or `["observe", strategy, batch
size, accepted drafts of each request, seconds, match lengths, match outcomes, sampled]`, see
`Observation`; in older traces `sampled` is missing, and all requests count as greedy. A replay
makes the same calls, so it leads to the same choices.

Runs in the scheduler process of the first rank. It opens no file: the caller passes `write`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from tlt_sglang.strategy.policy import Observation, Policy
from tlt_sglang.strategy.strategies import Strategy, parse


class TracedPolicy:
    """Writes a line for every call of `policy`."""

    def __init__(self, policy: Policy, write: Callable[[str], object]) -> None:
        self._policy, self._write = policy, write

    def choose(
        self, batch_size: int, match_lengths: Sequence[int] = (), sampled: Sequence[bool] = ()
    ) -> Strategy:
        """Return the policy's choice."""
        choice = self._policy.choose(batch_size, match_lengths, sampled)
        call = ["choose", batch_size, list(match_lengths), str(choice), list(sampled)]
        self._write(json.dumps(call) + "\n")
        return choice

    def observe(self, step: Observation) -> None:
        """Pass the step to the policy."""
        accepted = list(step.accepted)
        call = ["observe", str(step.strategy), step.batch_size, accepted, step.seconds]
        call += [list(step.match_lengths), list(step.match_outcomes), list(step.sampled)]
        self._write(json.dumps(call) + "\n")
        self._policy.observe(step)


def replay(policy: Policy, lines: Iterable[str]) -> Iterator[tuple[Strategy, Strategy]]:
    """Yield (choice in the trace, choice now) for every choice, by a policy in its first state.

    A last line without its end, as a killed engine leaves it, ends the replay. Raises ValueError
    for any other line that is not one of a trace.
    """
    for line in lines:
        if not line.endswith("\n"):
            return
        try:
            call, *rest = json.loads(line)
            if call == "choose":
                batch_size, match_lengths, choice, *sampled = rest
                yield parse(choice), policy.choose(batch_size, match_lengths, *sampled)
            elif call == "observe":
                strategy, *figures = rest
                policy.observe(Observation(parse(strategy), *figures))
            else:
                raise ValueError(call)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a line of a policy trace: {line.strip()[:100]}") from error
