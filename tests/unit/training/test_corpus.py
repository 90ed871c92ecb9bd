"""Prompts and responses on disk: read, appended to, interrupted, and wrong."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.training import prompts, requests
from tlt_sglang.training.corpus import (
    Prompt,
    Response,
    append_responses,
    read_data,
    read_responses,
)


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def chat(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def response(number: int) -> Response:
    return Response(Prompt((number, 1, 2), "data"), (3, 4), 1.0)


def data(folder: Path, *lines: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_responses_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "responses.jsonl"
    assert read_responses(path) == []
    append_responses(path, [response(1), response(2)])
    append_responses(path, [response(3)])
    assert read_responses(path) == [response(1), response(2), response(3)]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    append_responses(path, [response(1), response(2)])
    os.truncate(path, path.stat().st_size - 7)
    assert read_responses(path) == [response(1)]
    append_responses(path, [response(3)])
    assert read_responses(path) == [response(1), response(3)]


def test_what_is_no_response_is_told(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    append_responses(path, [response(1)])
    with path.open("a") as file:
        file.write('{"prompt": 3}\n')
    with pytest.raises(ConfigError, match=r"Line 2 of .* is not a response"):
        read_responses(path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="Cannot write"):
        append_responses(tmp_path / "file" / "responses.jsonl", [response(1)])


def test_lines_of_every_kind(tmp_path: Path) -> None:
    path = data(
        tmp_path,
        {"prompt": "ab", "kind": "reasoning"},
        {"messages": [{"role": "user", "content": "hi"}], "response": "yo"},
        "",
        {"text": "xyz"},
    )
    assert list(read_data(path, encode, chat)) == [
        Prompt(tuple(encode("ab")), "reasoning"),
        Response(Prompt(tuple(encode("<user>hi<assistant>")), "data"), tuple(encode("yo"))),
        Response(Prompt((ord("x"),), "text"), tuple(encode("yz")), 1.0),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("not JSON", r'Line 2 of .* is not \{"prompt"'),
        ([1], "Line 2"),
        ({"question": "?"}, "Line 2"),
        ({"prompt": 3}, "Line 2"),
        ({"prompt": "a", "response": 3}, "Line 2"),
        ({"prompt": ""}, "Line 2 of .* has an empty prompt"),
        ({"prompt": "a", "response": ""}, "Line 2 of .* has a response of no tokens"),
        ({"messages": [{"role": "user"}]}, "its messages make no chat"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        list(read_data(data(tmp_path, {"prompt": "ok"}, line), encode, chat))


def test_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_data(tmp_path / "none", encode, chat))
    with pytest.raises(ConfigError, match="holds no prompts"):
        list(read_data(data(tmp_path), encode, chat))
    (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_data(tmp_path / "data.jsonl", encode, chat))


def test_some_prompts_are_held_out_always_the_same() -> None:
    held = [n for n in range(2000) if Prompt((n, 7)).held_out]
    assert 40 < len(held) < 140
    assert held == [n for n in range(2000) if Prompt((n, 7), "other kind").held_out]


def test_what_a_user_would_say() -> None:
    assert prompts.clean_instruction("  Write a poem about rain.\n") == "Write a poem about rain."
    for text in ("short", "x" * 5000, "Write <|im_start|> it all down", "bell \x07 in the middle"):
        assert prompts.clean_instruction(text) is None


def test_problems_differ_and_repeat_with_their_seed() -> None:
    """More than there are tasks, so that every task gives several; few of them can be the same."""
    results = list(prompts.reasoning(300, 13))
    assert len(results) == 300
    assert len(set(results)) > 290
    assert results == list(prompts.reasoning(300, 13))
    assert len({*results} & {*prompts.reasoning(300, 13 + prompts.SEEDS_APART)}) < 30


def test_requests_differ() -> None:
    results = list(requests.compose(10_000, 1))
    assert len(results) == len(set(results)) > 5000
    assert results[:200] != list(requests.compose(200, 2))


def test_requests_of_a_seed_stay_the_same() -> None:
    text = "\n".join(requests.compose(10_000, 0))
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "e41cb7c92921d05a4507c52a5913830ae1f5a15094e21f1847649210ea60d490"
    )
