"""Sources of training prompts for `tlt data`, which generates them instead of downloading.

Instructions come from the target itself: after the start of a user's turn, a chat model writes what
users write (Magpie, arXiv 2406.08464). Problems come from reasoning-gym, which makes them from a
seed. Both are written as the JSON lines that `tlt train --data` reads.
"""

from __future__ import annotations

import contextlib
import io
import random
import warnings
from collections.abc import Iterator
from typing import Any

from tlt_sglang.errors import EnvironmentProblem

TRAINING_SEEDS = 1_000_000
"""Lowest seed of reasoning-gym for training; lower ones are for evaluation."""
SEEDS_APART = 10_000
"""Distance of the seeds of two data sets: problem n of seed s is the first of seed s + n."""
LONGEST = 1600
"""Most characters of a prompt."""


def user_turn(tokenizer: Any) -> str:
    """Return the chat template up to the start of a user's first message."""
    mark = "\x00"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return str(chat.partition(mark)[0])


def clean_instruction(text: str) -> str | None:
    """Return a generated user message without its margins, or None if it is not usable."""
    text = text.strip()
    printable = all(c.isprintable() or c in "\n\t" for c in text)
    return text if 12 <= len(text) <= LONGEST and "<|" not in text and printable else None


def reasoning(count: int, seed: int) -> Iterator[str]:
    """Yield `count` problems, from all tasks of reasoning-gym in turn.

    Raises EnvironmentProblem if the package is missing.
    """
    try:
        with _silence():
            from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            "The package reasoning-gym is missing; pip install 'tlt-sglang[train]'."
        ) from error
    names = [name for name in sorted(DATASETS) if name not in _EXCLUDED]
    random.Random(seed).shuffle(names)
    each = -(-count // len(names)) * 2
    with _silence():
        # One generator each: a new iterator of a data set would start at its first problem.
        tasks = {
            name: (problem["question"] for problem in create_dataset(name, seed=seed, size=each))
            for name in names
        }
    count_done = 0
    while tasks:
        for name in list(tasks):
            with _silence():
                question = next(tasks[name], None)
            if question is None:
                del tasks[name]
            elif len(question) <= LONGEST:
                yield question
                count_done += 1
            if count_done == count:
                return


_EXCLUDED = frozenset({"composite", "arc_1d", "arc_agi", "rearc"})
"""Tasks not used: the first consists of other tasks, the others are images spelled out as text."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the output and warnings of some tasks."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
