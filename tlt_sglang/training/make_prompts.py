"""`tlt data`: write prompts for `tlt train`: of the target itself, composed, of reasoning-gym."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.models.named import resolve_model
from tlt_sglang.training import generate, prompts, requests
from tlt_sglang.training.corpus import Prompt
from tlt_sglang.training.progress import Bar, say
from tlt_sglang.training.target import Target

INSTRUCTION_TOKENS = 160
"""Longest user message that is taken."""


def make_prompts(
    model: str,
    out: Path,
    *,
    instructions: int,
    composed: int,
    reasoning: int,
    seed: int,
    at_once: int,
) -> None:
    """Write `out`, in a random order. Raises EnvironmentProblem where that cannot be done."""
    found: list[tuple[str, str]] = []
    if reasoning:
        first = prompts.TRAINING_SEEDS + prompts.SEEDS_APART * seed
        found += [(text, "reasoning") for text in prompts.reasoning(reasoning, first)]
    if instructions:
        found += [(text, "instruction") for text in _instructions(model, instructions, at_once)]
    found += [(text, "instruction") for text in requests.compose(composed, seed)]
    random.Random(seed).shuffle(found)
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}], "kind": kind} for text, kind in found
    ]
    # One in four without the chat template, as many an RL prompt is.
    lines[::4] = [{"prompt": text, "kind": kind} for text, kind in found[::4]]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise EnvironmentProblem(f"Cannot write {out} ({error.strerror}).") from error
    say(f"{len(lines)} prompts in {out}")


def _instructions(model: str, count: int, at_once: int) -> list[str]:
    """Different messages that the target makes up at temperature 1."""
    path = resolve_model(model)
    target = Target(path, torch.device("cpu"))
    start = Prompt(tuple(target.encode(prompts.user_turn(target.tokenizer))), "instruction")
    found: dict[str, None] = {}

    def wanted() -> Iterator[generate.AnswerRequest]:
        for _ in range(3 * count):
            if len(found) >= count:
                return
            yield generate.AnswerRequest(start, 1.0, INSTRUCTION_TOKENS)

    with generate.serve(path, at_once, say) as server, Bar("instructions", count) as bar:
        for response in server.answers(wanted()):
            ended = len(response.output) < INSTRUCTION_TOKENS
            text = target.tokenizer.decode(response.output, skip_special_tokens=True)
            if ended and (message := prompts.clean_instruction(text)) and message not in found:
                found[message] = None
                bar.advance(1)
    return list(found)[:count]
