"""The n-gram index: what it proposes, what it forgets, and that memory and time are bounded."""

from __future__ import annotations

import random
import time

import pytest

from tlt_sglang.drafters.ngram import BLOCK, LENGTHS, LONGEST, NgramIndex


def plainly(texts: list[list[int]], tail: list[int], count: int) -> list[int]:
    """The continuation of the most recent place with the longest ending, by search."""
    for length in sorted((n for n in LENGTHS if n <= len(tail)), reverse=True):
        for text in reversed(texts):
            for end in range(len(text) - 1, length - 1, -1):
                if text[end - length : end] == tail[-length:]:
                    return text[end : end + count]
    return []


def test_what_followed_last_time() -> None:
    index = NgramIndex(1)
    index.extend("a", [1, 2, 3, 4, 5], [6, 7])
    assert index.propose([9, 2, 3], 3) == [4, 5, 6]
    assert index.propose([5, 6], 8) == [7]
    assert index.propose([6, 7], 8) == []  # nothing followed yet
    assert index.propose([3], 8) == []  # too short an ending
    index.extend("a", [1, 2, 3, 4, 5], [6, 7, 2, 3, 8])
    assert index.propose([2, 3], 2) == [8]  # the newest place
    assert index.propose([1, 2, 3], 2) == [4, 5]  # but a longer ending first


def test_all_is_forgotten() -> None:
    index, fresh = NgramIndex(1), NgramIndex(1)
    index.extend("a", [1, 2, 3, 4, 5], [6, 7])
    index.clear()
    assert index.propose([9, 2, 3], 3) == [] and len(index) == 0
    for either in (index, fresh):  # the same request again, from its beginning
        either.extend("a", [1, 2, 3, 4, 5], [6, 7])
        assert either.propose([9, 2, 3], 3) == [4, 5, 6]


def test_siblings_and_earlier_requests() -> None:
    index = NgramIndex(1)
    index.extend("a", [1, 2], [10, 11, 12, 13])
    index.extend("b", [1, 2], [10])
    assert index.propose([1, 2, 10], 3) == [11, 12, 13]
    index.keep([])
    assert len(index) == 0
    assert index.propose([1, 2, 10], 3) == [11, 12, 13]


@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_search(seed: int) -> None:
    chance = random.Random(seed)
    index = NgramIndex(4)
    texts: list[list[int]] = []
    for number in range(6):
        text = [chance.randrange(6) for _ in range(200)]
        for end in [*sorted(chance.sample(range(1, 201), 5)), 200]:
            index.extend(str(number), text[:20][:end], text[20:end])
        texts.append(text)
    for _ in range(200):
        text = chance.choice(texts)
        end = chance.randrange(2, 200)
        tail, count = text[:end], chance.randrange(1, 9)
        assert index.propose(tail, count) == plainly(texts, tail, count)


def test_texts_longer_than_a_block() -> None:
    text = random.Random(0).choices(range(40_000), k=3 * BLOCK)
    index = NgramIndex(4)
    index.extend("a", text, [])
    for end in range(2, len(text) - 1, 7):
        found = index.propose(text[:end], 4)
        assert found and found == text[end : end + len(found)]


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    index = NgramIndex(1)
    assert index.nbytes <= 2**20
    chance = random.Random(1)
    first = [chance.randrange(40_000) for _ in range(100)]
    index.extend("first", first, [])
    assert index.propose(first[:50], 1) == [first[50]]
    for number in range(1000):
        index.extend(str(number), chance.choices(range(40_000), k=300), [])
        index.keep([str(number), "first"])
    assert index.propose(first[:50], 1) == []
    # A request whose block went to others fills a new one.
    index.extend("first", first, [1, 2, 3, 4])
    assert index.propose([1, 2], 2) == [3, 4]
    with pytest.raises(ValueError, match="at least 1 MB"):
        NgramIndex(0)


def test_a_step_at_32k_tokens_takes_less_than_a_fifth_of_a_millisecond() -> None:
    index = NgramIndex(16)
    prompt = random.Random(2).choices(range(40_000), k=32_000)
    output: list[int] = []
    index.extend("a", prompt, output)
    seconds = []
    for token in range(200):
        output.append(token)
        started = time.perf_counter()
        index.extend("a", prompt, output)
        index.propose(output[-LONGEST:], 7)
        seconds.append(time.perf_counter() - started)
    assert sorted(seconds)[len(seconds) // 2] < 0.0002
