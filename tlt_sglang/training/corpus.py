"""Prompts, and the target's responses to them, as JSON lines: the data that a drafter learns from.

Used by `tlt train` and `tlt data`. A response file is only appended to, one whole line at a time,
so that an interrupted run continues where it stopped; an incomplete last line is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tlt_sglang.errors import ConfigError, EnvironmentProblem

HELD_OUT = 24
"""One in this many prompts is held out of training."""

Encode = Callable[[str], list[int]]
Chat = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Prompt:
    """A prompt, as token ids."""

    ids: tuple[int, ...]
    kind: str = "data"
    """Its origin: `instruction`, `reasoning`, `text` or `data`."""

    @property
    def key(self) -> str:
        """Return a name of the prompt that depends only on its tokens."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]

    @property
    def held_out(self) -> bool:
        """Return whether the prompt is for evaluation only; the same in every run."""
        return int(self.key, 16) % HELD_OUT == 0


@dataclass(frozen=True)
class Response:
    """A prompt and the tokens that follow it."""

    prompt: Prompt
    output: tuple[int, ...]
    temperature: float = 0.0

    @property
    def ids(self) -> list[int]:
        """Return the tokens of prompt and output."""
        return [*self.prompt.ids, *self.output]

    def to_json(self) -> str:
        """Return one line of a response file, without the line feed."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(fields: Any) -> Response:
        """Return the response of a decoded line, the inverse of `to_json`."""
        prompt = Prompt(tuple(fields["prompt"]["ids"]), fields["prompt"]["kind"])
        return Response(prompt, tuple(fields["output"]), fields["temperature"])


def read_responses(path: Path) -> list[Response]:
    """Read every complete line of a response file; a missing file has none."""
    if not path.exists():
        return []
    responses = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # incomplete: the writer was interrupted
        try:
            responses.append(Response.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"Line {number} of {path} is not a response; delete the line or the file."
            ) from error
    return responses


def append_responses(path: Path, responses: Iterable[Response]) -> None:
    """Append responses to a file, after dropping an incomplete line at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _drop_incomplete_line(file)
            for response in responses:
                file.write(response.to_json().encode() + b"\n")
                file.flush()
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write {path} ({error.strerror}); make room or choose another folder, then "
            "start again: the responses in it are kept."
        ) from error


def _drop_incomplete_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 20)))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    file.truncate(size - len(tail) + whole)
    file.seek(0, os.SEEK_END)


def read_data(path: Path, encode: Encode, chat: Chat) -> Iterator[Prompt | Response]:
    """Yield the prompts of a user's JSON lines, and responses where a line has one.

    A line is {"prompt": text} or {"messages": [...]}, and may have "response": text; or it is
    {"text": text}, which is learned from as it is. Raises ConfigError for any other line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data {path} cannot be read ({error}).") from error
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, kind, response = _line(path, number, line, chat)
        ids = encode(text)
        if kind == "text" and response is None:
            count += 1
            yield Response(Prompt(tuple(ids[:1]), kind), tuple(ids[1:]), 1.0)
            continue
        prompt = Prompt(tuple(ids), kind)
        if not prompt.ids:
            raise ConfigError(f"Line {number} of {path} has an empty prompt.")
        count += 1
        if response is None:
            yield prompt
        elif output := encode(response):
            yield Response(prompt, tuple(output))
        else:
            raise ConfigError(f"Line {number} of {path} has a response of no tokens.")
    if not count:
        raise ConfigError(f"The data {path} holds no prompts; give one JSON object a line.")


def _line(path: Path, number: int, line: str, chat: Chat) -> tuple[str, str, str | None]:
    """Return text of the prompt, kind, and text of the response."""
    problem = f'Line {number} of {path} is not {{"prompt": "..."}} or {{"messages": [...]}}.'
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(problem) from error
    if not isinstance(fields, dict):
        raise ConfigError(problem)
    if isinstance(plain := fields.get("text"), str) and len(plain) > 1:
        return plain, "text", None
    messages, text = fields.get("messages"), fields.get("prompt")
    if isinstance(messages, list):
        try:
            text = chat(messages)
        except Exception as error:  # whatever a chat template raises
            raise ConfigError(f"Line {number} of {path}: its messages make no chat.") from error
    response = fields.get("response")
    if not isinstance(text, str) or not (response is None or isinstance(response, str)):
        raise ConfigError(problem)
    return text, str(fields.get("kind", "data")), response
