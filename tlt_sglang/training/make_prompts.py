"""`tlt data`: write prompts for `tlt train`, from the target, a composer and reasoning-gym."""

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
"""Most tokens of a generated user message."""


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
    """Write the prompts to `out` in random order. Raises EnvironmentProblem if that fails."""
    texts: list[tuple[str, str]] = []
    if reasoning:
        first = prompts.TRAINING_SEEDS + prompts.SEEDS_APART * seed
        texts += [(text, "reasoning") for text in prompts.reasoning(reasoning, first)]
    if instructions:
        texts += [(text, "instruction") for text in _instructions(model, instructions, at_once)]
    texts += [(text, "instruction") for text in requests.compose(composed, seed)]
    random.Random(seed).shuffle(texts)
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": text}], "kind": kind} for text, kind in texts
    ]
    # One in four without the chat template, as in many RL workloads.
    lines[::4] = [{"prompt": text, "kind": kind} for text, kind in texts[::4]]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except OSError as error:
        raise EnvironmentProblem(f"Cannot write {out} ({error.strerror}).") from error
    say(f"{len(lines)} prompts in {out}")


def _instructions(model: str, count: int, at_once: int) -> list[str]:
    """Return different user messages that the target generates at temperature 1."""
    path = resolve_model(model)
    target = Target(path, torch.device("cpu"))
    start = Prompt(tuple(target.encode(prompts.user_turn(target.tokenizer))), "instruction")
    messages: dict[str, None] = {}

    def requests_until_enough() -> Iterator[generate.AnswerRequest]:
        for _ in range(3 * count):
            if len(messages) >= count:
                return
            yield generate.AnswerRequest(start, 1.0, INSTRUCTION_TOKENS)

    with generate.serve(path, at_once, say) as server, Bar("instructions", count) as bar:
        for response in server.answers(requests_until_enough()):
            ended = len(response.output) < INSTRUCTION_TOKENS
            text = target.tokenizer.decode(response.output, skip_special_tokens=True)
            if ended and (message := prompts.clean_instruction(text)) and message not in messages:
                messages[message] = None
                bar.advance(1)
    return list(messages)[:count]
