"""What a drafter learns from: prompts, and what the target answered to them, as JSON lines.

Runs in `tlt train` and `tlt data`. A response file is only ever appended to, one whole line at a
time, so that an interrupted run goes on where it stopped; a last line that was cut off is dropped.
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
"""One prompt in so many is never trained on."""

Encode = Callable[[str], list[int]]
Chat = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the target reads it."""

    ids: tuple[int, ...]
    kind: str = "data"
    """Where it comes from: `instruction`, `reasoning`, `text` or `data`."""

    @property
    def key(self) -> str:
        """A name for it that depends on its tokens alone."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()[:16]

    @property
    def held_out(self) -> bool:
        """Whether it is for evaluation only; the same in every run."""
        return int(self.key, 16) % HELD_OUT == 0


@dataclass(frozen=True)
class Response:
    """A prompt and what follows it."""

    prompt: Prompt
    output: tuple[int, ...]
    temperature: float = 0.0

    @property
    def ids(self) -> list[int]:
        """All tokens of it."""
        return [*self.prompt.ids, *self.output]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(fields: Any) -> Response:
        """The inverse of `to_json`, of its decoded line."""
        prompt = Prompt(tuple(fields["prompt"]["ids"]), fields["prompt"]["kind"])
        return Response(prompt, tuple(fields["output"]), fields["temperature"])


def read_responses(path: Path) -> list[Response]:
    """Every whole line of a response file; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # interrupted while it was written
        try:
            found.append(Response.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"Line {number} of {path} is no response; delete it or the file."
            ) from error
    return found


def append_responses(path: Path, responses: Iterable[Response]) -> None:
    """Add lines to a response file, dropping an unfinished one at its end."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _drop_unfinished(file)
            for response in responses:
                file.write(response.to_json().encode() + b"\n")
                file.flush()
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write {path} ({error.strerror}); make room or choose another folder, then "
            "start again: what is there is kept."
        ) from error


def _drop_unfinished(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 20)))
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    file.truncate(size - len(tail) + whole)
    file.seek(0, os.SEEK_END)


def read_data(path: Path, encode: Encode, chat: Chat) -> Iterator[Prompt | Response]:
    """Prompts, and responses where a line has one, from a user's JSON lines.

    A line is {"prompt": text} or {"messages": [...]}, and may have "response": text; or it is
    {"text": text}, learned from as it is. Raises ConfigError naming the line that is none of these.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The data {path} cannot be read ({error}).") from error
    found = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text, kind, response = _line(path, number, line, chat)
        ids = encode(text)
        if kind == "text" and response is None:
            found += 1
            yield Response(Prompt(tuple(ids[:1]), kind), tuple(ids[1:]), 1.0)
            continue
        prompt = Prompt(tuple(ids), kind)
        if not prompt.ids:
            raise ConfigError(f"Line {number} of {path} has an empty prompt.")
        found += 1
        if response is None:
            yield prompt
        elif output := encode(response):
            yield Response(prompt, tuple(output))
        else:
            raise ConfigError(f"Line {number} of {path} has a response of no tokens.")
    if not found:
        raise ConfigError(f"The data {path} holds no prompts; give one JSON object a line.")


def _line(path: Path, number: int, line: str, chat: Chat) -> tuple[str, str, str | None]:
    """(text of the prompt, kind, text of the response)."""
    wanted = f'Line {number} of {path} is not {{"prompt": "..."}} or {{"messages": [...]}}.'
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(wanted) from error
    if not isinstance(fields, dict):
        raise ConfigError(wanted)
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
        raise ConfigError(wanted)
    return text, str(fields.get("kind", "data")), response
