"""The n-gram index: its drafts, what it forgets, and that memory and time are bounded."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest

from tlt_sglang.drafters.ngram import NgramIndex
from tlt_sglang.drafters.ngram_kernels import BLOCK, LENGTHS

_names = itertools.count()


def draft_after(index: NgramIndex, text: Sequence[int], count: int) -> list[int]:
    """Return the draft of a new request with this text."""
    name = f"request {next(_names)}"
    index.extend([(name, text, [])])
    return draft_of(index, name, count)


def draft_of(index: NgramIndex, request: str, count: int) -> list[int]:
    matches = index.look_up([request], count)
    draft: list[int] = matches.drafts[0, : matches.counts[0]].tolist()
    assert (matches.lengths[0] in LENGTHS) == bool(draft)
    return draft


def by_search(texts: list[list[int]], tail: list[int], count: int) -> list[int]:
    """Return the continuation of the most recent, longest match, by a plain search.

    The last text ends in `tail`; a match in it goes on with itself.
    """
    for length in sorted((n for n in LENGTHS if n <= len(tail)), reverse=True):
        for text in reversed(texts):
            for end in range(len(text) - 1, length - 1, -1):
                if text[end - length : end] == tail[-length:]:
                    repeated = text[end:] * (count if text is texts[-1] else 1)
                    return repeated[:count]
    return []


def test_the_continuation_of_the_last_match() -> None:
    index = NgramIndex(1)
    index.extend([("a", [1, 2, 3, 4, 5], [6, 7])])
    assert draft_after(index, [9, 2, 3], 3) == [4, 5, 6]
    assert draft_after(index, [5, 6], 8) == [7]
    assert draft_after(index, [6, 7], 8) == []  # nothing followed yet
    assert draft_after(index, [3], 8) == []  # too short a suffix
    index.extend([("a", [1, 2, 3, 4, 5], [6, 7, 2, 3, 8])])
    assert draft_after(index, [2, 3], 2) == [8]  # the most recent match
    assert draft_after(index, [1, 2, 3], 2) == [4, 5]  # but a longer match first


def test_a_loop_goes_on() -> None:
    index = NgramIndex(1)
    assert draft_after(index, [1, 2, 3, 2, 3], 5) == [2, 3, 2, 3, 2]
    assert draft_after(index, [7, 7, 7], 3) == [7, 7, 7]


def test_an_id_that_is_used_again_begins_anew() -> None:
    index = NgramIndex(1)
    index.extend([("a", [1, 2, 3, 4], [5, 6])])
    index.begin(["a"])
    index.extend([("a", [1, 2, 3, 4], [])])
    assert draft_of(index, "a", 3) == [5, 6]


def test_clear_forgets_everything() -> None:
    index, fresh = NgramIndex(1), NgramIndex(1)
    index.extend([("a", [1, 2, 3, 4, 5], [6, 7])])
    index.clear()
    assert (
        len(index) == 0 and draft_of(index, "a", 3) == [] and draft_after(index, [9, 2, 3], 3) == []
    )
    for either in (index, fresh):  # the same request again, from its beginning
        either.extend([("a", [1, 2, 3, 4, 5], [6, 7])])
        assert draft_after(either, [9, 2, 3], 3) == [4, 5, 6]


def test_siblings_and_earlier_requests() -> None:
    index = NgramIndex(1)
    index.extend([("a", [1, 2], [10, 11, 12, 13]), ("b", [1, 2], [10])])
    assert draft_of(index, "b", 3) == [11, 12, 13]
    index.keep([])
    assert len(index) == 0
    assert draft_after(index, [1, 2, 10], 3) == [11, 12, 13]


@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_search(seed: int) -> None:
    rng = random.Random(seed)
    index = NgramIndex(256)  # so large that no two suffixes share an entry
    texts: list[list[int]] = []
    for number in range(8):
        text, end = [rng.randrange(6) for _ in range(200)], 0
        while end < len(text):
            end = min(len(text), end + rng.choice([1, 1, 1, 1, 2, 5, 20]))
            index.extend([(str(number), text[: min(end, 20)], text[20:end])])
            count = rng.randrange(1, 9)
            expected = by_search([*texts, text[:end]], text[:end], count)
            assert draft_of(index, str(number), count) == expected
        texts.append(text)


def test_a_batch_equals_its_requests_one_by_one() -> None:
    rng = random.Random(3)
    together, alone = NgramIndex(4), NgramIndex(4)
    texts = [[rng.randrange(8) for _ in range(300)] for _ in range(5)]
    ends, names = [0] * len(texts), [str(number) for number in range(len(texts))]
    for _ in range(220):
        ends = [min(300, end + rng.choice([0, 1, 1, 1, 3])) for end in ends]
        batch = [
            (name, text[: min(end, 9)], text[9:end])
            for name, text, end in zip(names, texts, ends, strict=True)
        ]
        together.extend(batch)
        for one in batch:
            alone.extend([one])
        assert together.look_up(names, 1).lengths == alone.look_up(names, 1).lengths


def test_texts_longer_than_a_block() -> None:
    text = random.Random(0).choices(range(40_000), k=3 * BLOCK)
    index = NgramIndex(4)
    index.extend([("a", text, [])])
    for end in range(1, len(text) - 1):
        index.extend([("b", text[:1], text[1:end])])
        if end > 1:
            draft = draft_of(index, "b", 4)
            assert draft and draft == text[end : end + len(draft)]


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    index = NgramIndex(1)
    assert index.nbytes <= 2**20
    rng = random.Random(1)
    first = [rng.randrange(40_000) for _ in range(100)]
    index.extend([("first", first, [])])
    assert draft_after(index, first[:50], 1) == [first[50]]
    for number in range(1000):
        index.extend([(str(number), rng.choices(range(40_000), k=300), [])])
        index.keep([str(number), "first"])
    assert draft_after(index, first[:50], 1) == []
    # A request whose block went to others fills a new one.
    assert draft_of(index, "first", 1) == []
    index.extend([("first", first, [1, 2, 3, 4])])
    assert draft_after(index, [1, 2], 2) == [3, 4]
    with pytest.raises(ValueError, match="at least 1 MB"):
        NgramIndex(0)


def test_a_block_that_is_taken_by_another_of_the_same_batch() -> None:
    index = NgramIndex(1)
    index.extend([("a", [1, 2, 3], [])])
    long = random.Random(4).choices(range(10, 40_000), k=2**18)
    index.extend([("a", [1, 2, 3], [4]), ("b", long, [])])
    assert draft_of(index, "a", 1) == []
    index.extend([("a", [1, 2, 3], [4, 5, 4, 5])])
    assert draft_of(index, "a", 2) == [4, 5]
    assert draft_after(index, long[-9:-1], 1) == long[-1:]


def test_a_step_at_32k_tokens_takes_less_than_a_fifth_of_a_millisecond() -> None:
    index = NgramIndex(16)
    prompt = random.Random(2).choices(range(40_000), k=32_000)
    output: list[int] = []
    index.extend([("a", prompt, output)])
    seconds = []
    for token in range(200):
        output.append(token)
        started = time.perf_counter()
        index.extend([("a", prompt, output)])
        index.look_up(["a"], 7)
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[len(seconds) // 2] < 0.0002
