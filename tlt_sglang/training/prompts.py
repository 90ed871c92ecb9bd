"""Prompts to train a drafter on, made and not downloaded: `tlt data`.

Instructions come from the target itself: given nothing but the beginning of a user's turn, a chat
model writes what users write (Magpie, arXiv 2406.08464). Problems come from reasoning-gym, which
makes them from a seed. Both are written as the JSON lines that `tlt train --data` reads.
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
"""Seeds of reasoning-gym from here on are for training; those below are for evaluation."""
SEEDS_APART = 10_000
"""A task's problem n of seed s is its first of seed s + n: data of two seeds keep this distance."""
LONGEST = 1600
"""Characters of the longest problem that is taken."""


def user_turn(tokenizer: Any) -> str:
    """The chat template up to where a user's first message begins."""
    mark = "\x00"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return str(chat.partition(mark)[0])


def clean_instruction(text: str) -> str | None:
    """A user's message as the target made it up, or None where it is none."""
    text = text.strip()
    printable = all(c.isprintable() or c in "\n\t" for c in text)
    return text if 12 <= len(text) <= LONGEST and "<|" not in text and printable else None


def reasoning(count: int, seed: int) -> Iterator[str]:
    """`count` problems over all of reasoning-gym's tasks in turn, from `seed` on.

    Raises EnvironmentProblem where the package is missing.
    """
    try:
        with _silence():
            from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            "The package reasoning-gym is missing; pip install 'tlt-sglang[train]'."
        ) from error
    names = [name for name in sorted(DATASETS) if name not in _LEFT_OUT]
    random.Random(seed).shuffle(names)
    each = -(-count // len(names)) * 2
    with _silence():
        # One generator each: asked for an iterator again, a data set starts from its first problem.
        tasks = {
            name: (problem["question"] for problem in create_dataset(name, seed=seed, size=each))
            for name in names
        }
    made = 0
    while tasks:
        for name in list(tasks):
            with _silence():
                question = next(tasks[name], None)
            if question is None:
                del tasks[name]
            elif len(question) <= LONGEST:
                yield question
                made += 1
            if made == count:
                return


_LEFT_OUT = frozenset({"composite", "arc_1d", "arc_agi", "rearc"})
"""The first is made of other tasks, the others are pictures written out, longer than an answer."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what some tasks print and warn of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
