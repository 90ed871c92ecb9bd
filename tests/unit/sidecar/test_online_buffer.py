"""The sidecar trains on these: this step and the long ones before, one version, bounded, fair."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sidecar.buffer import HELD_OUT, LONG_SHARE, REASONS, Buffer

WIDTH = 4
TOKEN_BYTES = 8 + 2 * WIDTH


def recorded(
    key: Any, response: int = 10, *, version: int = 1, step: int = 0, prompt: int = 2
) -> TokenSequence[Any]:
    tokens = prompt + response
    ids = np.arange(tokens, dtype=np.int64)
    return TokenSequence(
        ids,
        np.zeros((tokens, WIDTH), np.float16),
        prompt,
        request=str(key),
        target_version=version,
        rl_step=step,
    )


def filled(lengths: dict[str, int], limit: int = 1 << 30, seed: int = 0, **where: int) -> Buffer:
    buffer = Buffer(limit, seed)
    for key, length in lengths.items():
        buffer.add(recorded(key, length, **where))
    return buffer


def everything(buffer: Buffer) -> set[str]:
    """The keys of all sequences in it."""
    return {d.request for d in (*buffer.sample(1 << 30), *buffer.held_out())}


# ---- steps and versions --------------------------------------------------------------------------


def test_sequences_of_the_step_are_all_there() -> None:
    buffer = filled({str(i): 1 + i for i in range(50)})
    assert everything(buffer) == {str(i) for i in range(50)}


def test_the_next_step_keeps_the_long_ones_and_the_one_after_it_none() -> None:
    buffer = filled({str(i): 1 + i for i in range(40)}, step=3)
    buffer.add(recorded("new", 5, step=4))
    long = {str(i) for i in range(40 - int(40 * LONG_SHARE), 40)}
    assert everything(buffer) == long | {"new"}
    assert buffer.status()["of_the_step_before"] == len(long)
    buffer.move_on(1, 5)
    assert everything(buffer) == {"new"}
    buffer.move_on(1, 7)
    assert everything(buffer) == set()


def test_a_late_sequence_of_the_step_before_is_taken_if_it_is_long() -> None:
    buffer = filled({str(i): 10 * i + 10 for i in range(4)}, step=3)
    buffer.move_on(1, 4)
    assert not buffer.add(recorded("short", 39, step=3))
    assert buffer.add(recorded("long", 41, step=3))
    assert not buffer.add(recorded("too late", 99, step=2))
    assert everything(buffer) == {"3", "long"}
    assert (buffer.status()["short"], buffer.status()["late"]) == (1, 1)


def test_versions_of_the_target_are_never_mixed() -> None:
    buffer = filled({str(i): 1 + i for i in range(20)}, version=7, step=3)
    assert not buffer.add(recorded("old", 99, version=6, step=3))
    assert len(buffer) == 20
    buffer.add(recorded("new", 5, version=8, step=4))
    assert everything(buffer) == {"new"}
    assert buffer.status()["target_version"] == 8
    assert buffer.status()["outdated"] == 20


def test_a_new_version_may_bring_steps_that_begin_anew() -> None:
    buffer = filled({"a": 5}, version=1, step=90)
    assert buffer.add(recorded("b", version=2, step=1))
    assert buffer.add(recorded("c", version=2, step=2))
    assert buffer.status()["step"] == 2


def test_more_of_a_request_takes_the_place_of_what_was_there() -> None:
    buffer = filled({"a": 5})
    assert buffer.add(recorded("a", 9))
    assert not buffer.add(recorded("a", 7))
    assert [len(d) for d in (*buffer.sample(99), *buffer.held_out())] == [11]
    assert buffer.status()["bytes"] == 11 * TOKEN_BYTES
    assert (buffer.status()["replaced"], buffer.status()["repeated"]) == (1, 1)


# ---- bounds --------------------------------------------------------------------------------------


def test_it_never_holds_more_than_its_limit() -> None:
    buffer = Buffer(limit=500 * TOKEN_BYTES)
    dice = np.random.default_rng(0)
    for key in range(300):
        buffer.add(recorded(key, int(dice.integers(1, 90))))
        held = [*buffer.sample(1 << 30), *buffer.held_out()]
        assert buffer.status()["bytes"] == sum(d.nbytes for d in held) <= buffer.limit
    assert buffer.status()["bytes"] > 0.8 * buffer.limit
    assert buffer.status()["evicted"] == 300 - len(buffer)


def test_long_ones_stay_and_short_ones_are_not_wiped_out() -> None:
    stayed = {5: 0, 50: 0}
    for seed in range(20):
        buffer = filled({str(i): 50 if i % 2 else 5 for i in range(60)}, 900 * TOKEN_BYTES, seed)
        for sequence in (*buffer.sample(1 << 30), *buffer.held_out()):
            stayed[sequence.response_length] += 1
    assert stayed[50] > 2 * stayed[5] > 0


def test_what_can_never_fit_and_what_has_no_response_is_refused() -> None:
    buffer = filled({"a": 10}, limit=100 * TOKEN_BYTES)
    assert not buffer.add(recorded("b", 99))
    assert not buffer.add(recorded("c", 0))
    assert everything(buffer) == {"a"}
    assert (buffer.status()["too_large"], buffer.status()["empty"]) == (1, 1)


# ---- drawing -------------------------------------------------------------------------------------


def test_a_sample_keeps_to_its_budget_and_repeats_nothing() -> None:
    buffer = filled({str(i): 1 + i % 30 for i in range(200)})
    for _ in range(20):
        sample = buffer.sample(100)
        assert 70 < sum(map(len, sample)) <= 100
        assert len({d.request for d in sample}) == len(sample)


def test_a_sequence_longer_than_the_budget_comes_alone() -> None:
    buffer = filled({str(i): 200 for i in range(9)})
    assert [len(d) for d in buffer.sample(100)] == [202]


def test_long_ones_are_drawn_more_often() -> None:
    buffer = filled({str(i): 40 if i % 2 else 4 for i in range(100)})
    first = [buffer.sample(1)[0].response_length for _ in range(300)]
    assert 0.85 < first.count(40) / 300 < 0.97  # 10 of 11


def test_equal_seeds_draw_equal_samples_and_others_do_not() -> None:
    lengths = {str(i): 1 + i % 17 for i in range(80)}

    def draws(seed: int) -> list[list[str]]:
        buffer = filled(lengths, 600 * TOKEN_BYTES, seed)
        return [[d.request for d in buffer.sample(60)] for _ in range(5)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(3)[0] != draws(3)[1]


def test_an_empty_buffer_has_nothing_to_draw() -> None:
    assert Buffer(1000).sample(100) == Buffer(1000).held_out() == []


def test_held_out_requests_are_never_drawn_and_always_the_same() -> None:
    buffer = filled({str(i): 10 for i in range(1000)})
    held_out = {d.request for d in buffer.held_out()}
    assert 0.6 < len(held_out) * HELD_OUT / 1000 < 1.5
    assert not held_out & {d.request for d in buffer.sample(1 << 30)}
    again = filled({str(i): 20 for i in reversed(range(1000))}, version=5, step=9)
    assert {d.request for d in again.held_out()} == held_out


def test_all_samples_of_a_prompt_are_held_out_or_none() -> None:
    """Prompts of 40 lengths, eight samples each; of half of them the prompt was cached."""
    buffer = Buffer(1 << 30)
    for prompt, sample in itertools.product(range(2, 42), range(8)):
        whole = recorded(f"{prompt} {sample}", prompt=prompt)
        buffer.add(whole if sample % 2 else whole.window(prompt - 1, 99))
    held = [sequence.request.split()[0] for sequence in buffer.held_out()]
    trained = {sequence.request.split()[0] for sequence in buffer.sample(1 << 30)}
    assert not trained & set(held) and len(trained) + len(set(held)) == 40
    assert 1 <= len(set(held)) < 8 and all(held.count(prompt) == 8 for prompt in held)


@pytest.mark.parametrize("seed", range(20))
def test_of_two_prompts_one_is_held_out(seed: int) -> None:
    buffer = Buffer(1 << 30, seed)
    for version, prompts in enumerate(((2, 3), (3, 4), (5, 2)), 1):
        for prompt, sample in itertools.product(prompts, range(8)):
            buffer.add(recorded(f"{prompt} {sample}", prompt=prompt, version=version))
        held = {sequence.prompt_length for sequence in buffer.held_out()}
        assert len(held) == 1 and len(buffer.sample(1 << 30)) == 8


def test_any_prompt_may_be_the_one_that_is_held_out() -> None:
    """The first to arrive have short answers, so that the gate would see the easiest text."""
    places = []
    for seed in range(200):
        buffer = Buffer(1 << 30, seed)
        trained: set[int] = set()
        for prompt in range(2, 10):
            buffer.add(recorded(f"{prompt}", prompt=prompt))
            trained |= (
                {one.prompt_length for one in buffer.sample(1 << 30)} if prompt > 2 else set()
            )
        held = {one.prompt_length for one in buffer.held_out()}
        assert held and not held & trained
        places += [min(held)] * (len(held) == 1)
    share = {place: places.count(place) / len(places) for place in range(2, 10)}
    assert max(share.values()) < 0.25 and min(share[place] for place in range(3, 10)) > 0.05


def test_it_begins_anew() -> None:
    buffer = filled({"a": 10}, version=5, step=2)
    assert not buffer.add(recorded("b", version=0))
    buffer.clear()
    assert buffer.add(recorded("b", version=0)) and everything(buffer) == {"b"}
    assert buffer.target_version == 0


def test_a_later_piece_of_a_response_belongs_to_its_prompt() -> None:
    buffer = filled({f"a{i}": 10 for i in range(4)})
    for i in range(4):
        buffer.add(recorded(f"b{i}", 10, prompt=7))
    held = {sequence.request for sequence in buffer.held_out()}
    for i in range(4):
        for name in "ab":
            buffer.add(recorded(f"{name}{i}", 30, prompt=0))
    assert {sequence.request for sequence in buffer.held_out()} == held and len(held) == 4


# ---- what it is given ----------------------------------------------------------------------------


def test_tensors_are_as_good_as_arrays() -> None:
    ids, features = torch.arange(8), torch.zeros(8, 3 * WIDTH, dtype=torch.bfloat16)
    sequence = TokenSequence(
        ids, features, 3, torch.zeros(8, WIDTH).bfloat16(), "a", target_version=1
    )
    buffer = Buffer(10_000)
    assert buffer.add(sequence)
    assert buffer.status()["bytes"] == 8 * (8 + 2 * 4 * WIDTH)
    (results,) = (*buffer.sample(99), *buffer.held_out())
    assert results.features is features and (len(results), results.response_length) == (8, 5)


def test_features_that_do_not_go_with_the_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"request a: ids and features have \[7, 8\] rows"):
        TokenSequence(np.zeros(8), np.zeros((7, WIDTH)), 3, request="a")


def test_the_counters_account_for_every_sequence_seen() -> None:
    buffer = Buffer(limit=300 * TOKEN_BYTES)
    dice = np.random.default_rng(1)
    for key in range(400):
        step, back = key // 40, int(dice.integers(0, 3))
        length, name = int(dice.integers(0, 60)), int(dice.integers(0, 300))
        buffer.add(recorded(name, length, version=1 + step // 4, step=max(0, step - back)))
    status = buffer.status()
    assert all(status[reason] > 0 for reason in REASONS if reason not in ("too_large",))
    left = sum(status[reason] for reason in REASONS if reason != "seen")
    assert status["seen"] == 400 == left + status["sequences"]


def test_streams_draw_differently_and_hold_out_the_same() -> None:
    lengths = {str(number): 8 for number in range(64)}
    one, other = filled(lengths), filled(lengths)
    other.stream = "other"
    draws = [[s.request for s in buffer.sample(64)] for buffer in (one, other)]
    assert draws[0] != draws[1]
    held = [[s.request for s in buffer.held_out()] for buffer in (one, other)]
    assert held[0] == held[1] != []
