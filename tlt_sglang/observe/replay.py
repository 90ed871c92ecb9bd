"""`tlt replay EVENTS --url URL`: send logged requests again, and compare the answers by token.

Runs in a process of its own, against a server that runs. An answer is the same if the weights are,
whatever was drafted, as long as it is greedy or sampled by a seed.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tlt_sglang.config import command_line as commands
from tlt_sglang.config.command_line import Parser
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.observe import logged_answers
from tlt_sglang.observe.events import Json
from tlt_sglang.observe.logged_answers import LoggedAnswer

SECONDS = 3600.0
"""Time limit of one answer."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A logged answer beside the answer that the server gives now."""

    logged: LoggedAnswer
    output_ids: list[int]
    weight_version: str | None = None
    refusal: str | None = None
    """The server's message, where it does not serve the request."""

    @property
    def position(self) -> int | None:
        """The first output position, from 0 on, where the tokens differ; None if they do not."""
        pairs = enumerate(zip(self.logged.output_ids, self.output_ids, strict=False))
        differing = (i for i, (before, now) in pairs if before != now)
        shorter, longer = sorted((len(self.logged.output_ids), len(self.output_ids)))
        return next(differing, None if shorter == longer else shorter)

    @property
    def agrees(self) -> bool:
        """True if the server gives the logged answer."""
        return self.refusal is None and self.position is None

    @property
    def other_weights(self) -> bool:
        """True if the server reports another version of the target than the log."""
        return self.refusal is None and [self.weight_version] != self.logged.weight_versions

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"refused: {self.refusal}"
        at, length = self.position, len(self.logged.output_ids)
        if at is None:
            return f"{length} tokens, the same"
        before, now = _token(self.logged.output_ids, at), _token(self.output_ids, at)
        return f"differs at position {at} of {length}: {before} in the log, {now} now"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status.

    0 if all answers are the same, 1 if one differs or for a problem, 2 for bad usage.
    """
    differing: list[Comparison] = []
    try:
        status = commands.run("replay", lambda words: differing.extend(_replay(words)), argv)
    except KeyboardInterrupt:
        return 1
    return status or (1 if differing else 0)


def _replay(argv: Sequence[str]) -> list[Comparison]:
    """Send the requests, print what comes of each, and return those whose answers differ."""
    parser = Parser("tlt replay", "Send logged requests again, and compare the answers by token.")
    parser.add_argument(
        "events", type=Path, metavar="EVENTS", help="Event log of a server with --tlt-log-requests"
    )
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:30000",
        metavar="URL",
        help="Address of the server to send them to (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key", default="", metavar="KEY", help="API key of the server (default: none)"
    )
    commands.add_number(parser, "--concurrency", 8, "Number of requests in flight")
    if commands.print_help(parser, argv):
        return []
    args = parser.parse_args(argv)
    log = logged_answers.read(args.events)
    answers = [answer for answer in log.answers if answer.repeatable]
    if not answers:
        raise ConfigError(
            f"All requests of {args.events} were sampled without a seed, which cannot be repeated; "
            "log those of a server with coupled sampling."
        )

    # One line for each request as it is answered, which also shows the progress.
    print(f"Sending {len(answers)} requests of {args.events} to {args.url}.", flush=True)
    compared = []
    send = _Sender(args.url, args.api_key)
    for comparison in _each(send, answers, args.concurrency):
        compared.append(comparison)
        place = f"{len(compared):>{len(str(len(answers)))}}/{len(answers)}"
        print(f"[{place}] {comparison.logged.name}: {comparison}", flush=True)
    print(*summary(compared, len(log.answers) - len(answers), log.skipped), sep="\n")
    return [comparison for comparison in compared if not comparison.agrees]


def _each(
    send: Callable[[LoggedAnswer], Comparison], answers: Sequence[LoggedAnswer], concurrency: int
) -> Iterator[Comparison]:
    """Yield the comparisons in the order of the log; the first problem ends them all."""
    threads = ThreadPoolExecutor(concurrency)
    try:
        yield from threads.map(send, answers)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def summary(compared: Sequence[Comparison], unseeded: int, skipped: int) -> Iterator[str]:
    """Yield the lines that sum up a replay."""
    same = sum(comparison.agrees for comparison in compared)
    refused = sum(comparison.refusal is not None for comparison in compared)
    counts = f"{same} the same, {len(compared) - same - refused} different"
    yield f"{len(compared)} answers: {counts}" + (f", {refused} refused." if refused else ".")
    others = [comparison for comparison in compared if comparison.other_weights]
    if others:
        before = sorted({name for one in others for name in one.logged.weight_versions})
        now = sorted({str(one.weight_version) for one in others})
        versions = f"{', '.join(before)} in the log, {', '.join(now)} now"
        yield f"With other weights than in the log: {len(others)} ({versions})."
    if unseeded:
        yield f"Left out, as they were sampled without a seed: {unseeded}."
    if skipped:
        yield f"Lines of the log that cannot be read: {skipped}."


class _Sender:
    """Sends requests to one server."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/") + "/generate"
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, logged: LoggedAnswer) -> Comparison:
        """Return the comparison with the server's answer.

        Raises EnvironmentProblem if it does not answer, and ConfigError if it does not sample by
        seeds.
        """
        try:
            answer = self._post(logged.body)
        except urllib.error.HTTPError as error:
            return Comparison(logged, [], refusal=_message(error))
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(
                f"The server at {self._url} does not answer ({error}); start one, or give --url."
            ) from error
        meta_info = answer["meta_info"]
        if not logged.greedy and meta_info.get("sampling_seed") != logged.seed:
            raise ConfigError(
                f"The server at {self._url} does not sample by the seeds of requests; start it "
                "with coupled sampling."
            )
        return Comparison(logged, answer["output_ids"], str(meta_info["weight_version"]))

    def _post(self, body: Json) -> Json:
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            answer: Json = json.load(response)
        return answer


def _message(error: urllib.error.HTTPError) -> str:
    """Return the sentence in a refusal of the server."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"


def _token(tokens: Sequence[int], position: int) -> str:
    return f"token {tokens[position]}" if position < len(tokens) else "the end"
