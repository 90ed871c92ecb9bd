"""Answered requests of an event log (`--tlt-log-requests`), read back to be sent again.

Runs in `tlt replay`. It reads files, and asks no server.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from tlt_sglang.errors import ConfigError
from tlt_sglang.observe.events import Json

_OTHER_FIELDS = ("event", "time", "pid", "id", "output_ids", "finish_reason")
_VERSIONS = ("weight_versions", "drafter_versions")


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """One request with its answer."""

    name: str
    """Its id."""
    body: Json
    """The request as `POST /generate` takes it: token ids, parameters, and what else changes it."""
    output_ids: list[int]
    weight_versions: list[str]
    """Versions of the target that computed the answer, in order."""

    @property
    def greedy(self) -> bool:
        """True if the answer is made of the most likely tokens."""
        parameters = self.body["sampling_params"]
        return bool(parameters.get("temperature", 1.0) == 0 or parameters.get("top_k") == 1)

    @property
    def seed(self) -> int | None:
        """The seed by which the answer was sampled; None without one."""
        seed: int | None = self.body["sampling_params"].get("sampling_seed")
        return seed

    @property
    def repeatable(self) -> bool:
        """True if the answer is a function of weights and request."""
        return self.greedy or self.seed is not None


@dataclass
class LoggedAnswers:
    """The answered requests of a log, in its order."""

    answers: list[LoggedAnswer] = field(default_factory=list)
    skipped: int = 0
    """Lines that are cut, as by a crash."""


def read(path: Path) -> LoggedAnswers:
    """Return the answered requests of an event log.

    Raises ConfigError if it cannot be read, is not an event log, or holds no requests, or others
    than this version writes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"The event log {path} cannot be read ({reason}); name the file that a server was "
            "given with --tlt-events."
        ) from error
    log, events = LoggedAnswers(), 0
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            log.skipped += bool(line.strip())
            continue
        events += 1
        if kind == "request":
            log.answers.append(_answer(event, f"Line {number} of {path}"))
    if not events and log.skipped:
        raise ConfigError(f"{path} is not an event log; name the file of --tlt-events.")
    if not log.answers:
        raise ConfigError(
            f"The event log {path} holds no requests; start the server with --tlt-log-requests."
        )
    return log


def _answer(event: Json, place: str) -> LoggedAnswer:
    """Return the request of one line; raise ConfigError, naming its place, if it has another form.

    Of an answer that was aborted, only the logged tokens are asked for again.
    """
    try:
        output_ids = [_integer(token) for token in event["output_ids"]]
        body: Json = {k: v for k, v in event.items() if k not in (*_OTHER_FIELDS, *_VERSIONS)}
        body["input_ids"] = [_integer(token) for token in event["input_ids"]]
        body["sampling_params"] = parameters = dict(event["sampling_params"])
        if event["finish_reason"]["type"] == "abort":
            parameters["max_new_tokens"] = len(output_ids)
            least = parameters.get("min_new_tokens") or 0
            parameters["min_new_tokens"] = min(least, len(output_ids))
        versions = [str(version) for version in event["weight_versions"]]
        return LoggedAnswer(str(event["id"]), body, output_ids, versions)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{place} is a request of another form ({error!r}); use the version of tlt-sglang that "
            "wrote it."
        ) from error


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a token id")
    return value
