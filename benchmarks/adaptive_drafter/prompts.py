"""Prompts for `bench_adaptive_drafter`: as people write them, and of one kind."""

from __future__ import annotations

import random

OBJECTS = (
    *("a list", "a string", "a dictionary", "a matrix"),
    *("a queue", "a set", "a file", "a tree"),
)
VERBS = ("sorts", "reverses", "counts", "filters", "merges", "prints", "copies", "checks")
WAYS = (
    *("without recursion", "with a test", "with type hints", "in one line"),
    *("step by step", "with error handling", "as a class"),
)


def composed(count: int) -> list[str]:
    """Return requests as people write them."""
    from tlt_sglang.training.requests import compose

    return list(compose(count, seed=11))


def one_kind(count: int) -> list[str]:
    """Return requests for programs, of which the shipped drafter has been trained on few."""
    texts = [
        f"Write a Python function that {verb} {name} {way}."
        for name in OBJECTS
        for verb in VERBS
        for way in WAYS
    ]
    random.Random(3).shuffle(texts)
    return texts[:count]
