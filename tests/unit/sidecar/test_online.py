"""The sidecar's parts: from a log to sequences, from sequences to a better drafter."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.learning import SIZE, VOCAB, drafter, frozen
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.record import END, PROMPT, Record, request_key
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.harvest.writer import Writer
from tlt_sglang.sidecar import feed as feeding
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.feed import Feed
from tlt_sglang.sidecar.learner import Learner, cut
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.weights import files

WIDTH = 4 * SIZE
SETTINGS = LearnerSettings(
    batch_tokens=48, accumulate=1, learning_rate=3e-3, gate_steps=5, warmup=2
)


def recorded(key: str, length: int, prompt: int = 4) -> TokenSequence[torch.Tensor]:
    """A request of a target that counts: each token is the one before plus one, and so are its
    hidden states, so that a drafter can learn it."""
    start = int.from_bytes(request_key(key)[:2], "little") % VOCAB
    ids = (torch.arange(length) + start) % VOCAB
    shared = frozen()
    # What makes the head choose the token after.
    last = shared.head[:0].new_zeros(length, SIZE)
    for row, token in enumerate(ids.tolist()):
        place = int(shared.draft_index[(token + 1) % VOCAB])
        last[row] = 3 * shared.head[place] if place >= 0 else 0
    features = torch.cat([last, last, last], dim=-1)
    return TokenSequence(ids, features.bfloat16(), prompt, last.bfloat16(), key)


def filled(count: int = 64, length: int = 24) -> Buffer:
    buffer = Buffer(1 << 24)
    for number in range(count):
        buffer.add(recorded(str(number), length))
    return buffer


# ---- from a log to sequences ---------------------------------------------------------------------


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    made = Writer.create(1 << 20, WIDTH, "bfloat16", tmp_path)
    yield made
    made.close()


def write(
    writer: Writer, name: str, tokens: list[int], start: int = 0, version: int = 0, flags: int = 0
) -> None:
    values = torch.arange(len(tokens) * WIDTH).view(-1, WIDTH).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint16)
    writer.write(Record(request_key(name), start, np.array(tokens, np.int32), bits, version, flags))


def announced(store: Path, writer: Writer) -> Announcement:
    reports = Announcement(str(writer.path), "cpu", "model", "drafter", seed=False)
    reports.write(store)
    return reports


def test_finished_requests_become_sequences(tmp_path: Path, writer: Writer) -> None:
    buffer = Buffer(1 << 20)
    feed = Feed(tmp_path, buffer, SIZE, 3, assembled=1 << 20)
    assert feed.pump() == 0
    announced(tmp_path, writer)
    write(writer, "a", [1, 2, 3], flags=PROMPT)
    write(writer, "a", [4, 5], start=3)
    write(writer, "b", [6, 7])
    write(writer, "a", [], flags=END)
    feed._looked = float("-inf")
    assert feed.pump() == 4
    (sequence,) = [*buffer.sample(100), *buffer.held_out()]
    assert sequence.ids.tolist() == [1, 2, 3, 4, 5]
    assert sequence.prompt_length == 3
    assert sequence.features.shape == (5, 3 * SIZE)
    assert sequence.last is not None and sequence.last.shape == (5, SIZE)
    assert float(sequence.last[0, 0]) == 3 * SIZE
    feed.close()


def test_what_is_unfinished_is_taken_when_nothing_more_comes(
    tmp_path: Path, writer: Writer
) -> None:
    now = [0.0]
    buffer = Buffer(1 << 20)
    announced(tmp_path, writer)
    feed = Feed(tmp_path, buffer, SIZE, 3, assembled=1 << 20, clock=lambda: now[0])
    write(writer, "a", [1, 2])
    feed.pump()
    assert not len(buffer)
    now[0] = feeding.QUIET_SECONDS + 0.1
    feed.pump()
    assert len(buffer) == 1
    feed.close()


def test_a_long_response_is_taken_before_it_ends(tmp_path: Path, writer: Writer) -> None:
    """The last ones of a rollout end with it, just before the target changes."""
    now, buffer = [0.0], Buffer(1 << 20)
    announced(tmp_path, writer)
    feed = Feed(tmp_path, buffer, SIZE, 3, assembled=1 << 20, clock=lambda: now[0])
    write(writer, "a", [1, 2], flags=PROMPT)
    for start in range(2, 302, 4):
        write(writer, "a", [3, 4, 5, 6], start=start)
        now[0] += 0.1
        feed.pump()
    (sequence,) = [*buffer.sample(1000), *buffer.held_out()]
    assert len(sequence) > 150 and not sequence.ended and sequence.prompt_length == 2
    write(writer, "a", [], flags=END)
    feed.pump()
    (sequence,) = [*buffer.sample(1000), *buffer.held_out()]
    assert len(sequence) == 302 and sequence.ended
    assert buffer.status()["replaced"] >= 1
    feed.close()


def test_versions_that_were_not_announced_are_left_out(tmp_path: Path, writer: Writer) -> None:
    buffer = Buffer(1 << 20)
    reports = announced(tmp_path, writer)
    feed = Feed(tmp_path, buffer, SIZE, 3, assembled=1 << 20)
    write(writer, "a", [1, 2], version=1, flags=END)
    feed.pump()
    assert not len(buffer)
    replace(reports, target_version=1).write(tmp_path)
    feed._looked = float("-inf")
    write(writer, "b", [1, 2], version=1, flags=END)
    feed.pump()
    assert len(buffer) == 1 and buffer.target_version == 1
    feed.close()


def test_engines_share_the_memory_of_unfinished_requests(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Writer.create(1 << 20, WIDTH, "bfloat16", tmp_path)
    announced(tmp_path, writer)
    monkeypatch.setattr(files, "owned", lambda name: f"{name}@1@elsewhere")
    announced(tmp_path, other)
    monkeypatch.undo()
    feed = Feed(tmp_path, Buffer(1 << 20), SIZE, 3, assembled=1000)
    feed.pump()
    assert [source.assembler.most_bytes for source in feed._sources.values()] == [500, 500]
    other.close()
    feed.pump()
    feed._looked = float("-inf")
    feed.pump()
    assert [source.assembler.most_bytes for source in feed._sources.values()] == [1000]
    feed.close()


def test_a_log_of_another_drafter_is_not_read(tmp_path: Path, writer: Writer) -> None:
    announced(tmp_path, writer)
    feed = Feed(tmp_path, Buffer(1 << 20), SIZE + 1, 3, assembled=1 << 20)
    write(writer, "a", [1], flags=END)
    assert feed.pump() == 0
    assert feed.status()["engines"] == 0


def test_an_engine_that_ends_is_let_go(tmp_path: Path, writer: Writer) -> None:
    reports = announced(tmp_path, writer)
    feed = Feed(tmp_path, Buffer(1 << 20), SIZE, 3, assembled=1 << 20)
    feed.pump()
    assert feed.status()["engines"] == 1
    writer.close()
    feed.pump()
    assert feed.status()["engines"] == 0
    assert reports.harvest not in feed._sources


def test_what_a_killed_engine_announced_is_removed(tmp_path: Path) -> None:
    path = Announcement("log", "cpu", "model", "drafter", seed=True).write(tmp_path)
    weights = announce.embed_and_head_path(tmp_path, 3)
    weights.touch()
    assert [engine.seed for engine in announce.read(tmp_path)] == [True]
    dead = next(pid for pid in range(2**22 - 1, 1, -1) if not Path(f"/proc/{pid}").exists())
    for old in (path, weights):
        old.rename(old.with_name(old.name.replace(f"@{os.getpid()}@", f"@{dead}@")))
    assert announce.read(tmp_path) == []
    assert list((tmp_path / announce.FOLDER).iterdir()) == []


# ---- from sequences to a better drafter ----------------------------------------------------------


def test_a_long_sequence_is_cut_where_it_answers() -> None:
    chance, sequence = random.Random(0), recorded("a", 200, prompt=120)
    for _ in range(50):
        part = cut(sequence, 40, chance)
        assert len(part) == 40
        assert 1 <= part.prompt_length < 40
        first = int((sequence.ids == part.ids[0]).nonzero()[0])
        assert first == 0 or part.features.shape[0] == 40
    assert len(cut(sequence, 500, chance)) == 200
    assert recorded("b", 8, prompt=0).response_start == 1


def test_it_learns_and_the_gate_lets_it_through() -> None:
    torch.manual_seed(0)
    buffer = filled()
    learner = Learner(drafter(), frozen(), buffer, SETTINGS, torch.device("cpu"))
    assert learner.can_train()
    first = learner.gate()
    assert first is not None and not first.passed and first.running == first.candidate
    assert learner.micro_step()
    assert learner.depth == 1
    for _ in range(149):
        assert learner.micro_step()
    gate = learner.gate()
    assert gate is not None and gate.passed
    assert gate.candidate > 1.3 * gate.running
    learner.published()
    again = learner.gate()
    assert again is not None and not again.passed


def test_later_drafts_are_trained_once_the_first_is_right_often() -> None:
    torch.manual_seed(0)
    learner = Learner(drafter(), frozen(), filled(), SETTINGS, torch.device("cpu"))
    depths = []
    for _ in range(150):
        learner.micro_step()
        depths.append(learner.depth)
    assert depths[0] == 1 and depths[-1] == SETTINGS.steps
    # One that has learned before, whatever the target does now, begins where it was.
    again = Learner(learner.drafter, frozen(), filled(), SETTINGS, torch.device("cpu"))
    again.micro_step()
    assert again.depth == SETTINGS.steps


def test_a_micro_batch_is_bounded() -> None:
    learner = Learner(drafter(), frozen(), filled(length=90), SETTINGS, torch.device("cpu"))
    for _ in range(20):
        assert sum(map(len, learner.draw())) <= SETTINGS.batch_tokens


def test_without_data_nothing_is_done() -> None:
    learner = Learner(drafter(), frozen(), Buffer(1 << 20), SETTINGS, torch.device("cpu"))
    assert not learner.can_train() and not learner.micro_step()
    assert learner.gate() is None


def test_it_goes_on_where_it_was_and_begins_again_from_other_weights() -> None:
    device = torch.device("cpu")
    one = Learner(drafter(), frozen(), filled(), SETTINGS, device)
    for _ in range(6):
        one.micro_step()
    other = Learner(drafter(seed=5), frozen(), filled(), SETTINGS, device)
    other.restore(one.state())
    assert (other.step, other.tokens) == (one.step, one.tokens)
    for name, weight in one.weights().items():
        assert torch.equal(weight, other.weights()[name])
    start = drafter(seed=9).state_dict()
    other.begin_again(start)
    for name, weight in start.items():
        assert torch.equal(weight, other.weights()[name])
    assert not other.training.optimizer.state


def test_micro_batches_get_as_small_as_they_have_to() -> None:
    now = [0.0]
    settings = replace(SETTINGS, batch_tokens=512, micro_seconds=0.1)
    device = torch.device("cpu")
    one = Learner(drafter(), frozen(), filled(length=90), settings, device, lambda: now[0])
    for _ in range(30):
        one._fit_in(0.3)
    assert one.batch_tokens == 64
    assert sum(map(len, one.draw())) <= 64
    for _ in range(60):
        one._fit_in(0.01)
    assert one.batch_tokens == 512
    for _ in range(9):
        one._fit_in(0.07)
    assert one.batch_tokens == 512


def test_an_optimizer_step_of_small_micro_batches_takes_more_of_them() -> None:
    settings = replace(SETTINGS, batch_tokens=256, accumulate=2)
    one = Learner(drafter(), frozen(), filled(), settings, torch.device("cpu"))
    steps = []
    for tokens in (256, 256, 64, 64, 64, 64, 128, 256):
        one.batch_tokens = tokens
        one.micro_step()
        steps.append(one.step)
    assert steps == [0, 1, 1, 1, 1, 1, 1, 2]


def test_a_gate_without_enough_to_judge_by_is_repeated_soon() -> None:
    learner = Learner(drafter(), frozen(), filled(count=2), SETTINGS, torch.device("cpu"))
    while not learner.gate_is_due():
        assert learner.micro_step()
    assert learner.gate() is None or learner.settings.gate_steps > 1
    due = learner.step
    while not learner.gate_is_due():
        assert learner.micro_step()
    assert 1 <= learner.step - due < learner.settings.gate_steps


def test_the_rate_rises_again_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, warmup=4, accumulate=1)
    learner = Learner(drafter(), frozen(), filled(), settings, torch.device("cpu"))
    rates: list[float] = []

    def update(rate: float) -> bool:
        rates.append(rate)
        return True

    monkeypatch.setattr(learner.training, "update", update)
    for _ in range(6):
        learner.micro_step()
    learner.begin_again(drafter(seed=9).state_dict())
    for _ in range(2):
        learner.micro_step()
    shares = [rate / settings.learning_rate for rate in rates]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.25, 0.5])


def test_what_is_judged_and_published_is_the_average_of_recent_steps() -> None:
    settings = replace(SETTINGS, accumulate=1, averaging=0.25)
    learner = Learner(drafter(), frozen(), filled(), settings, torch.device("cpu"))
    start = {name: tensor.clone() for name, tensor in learner.weights().items()}
    steps: list[dict[str, torch.Tensor]] = []
    while len(steps) < 8:
        learner.micro_step()
        steps.append({name: tensor.clone() for name, tensor in learner.weights().items()})
    for name, tensor in learner.candidate().items():
        average = start[name]
        for decay, step in zip([1 / 10, 2 / 11, 3 / 12, *[0.25] * 5], steps, strict=True):
            average = decay * average + (1 - decay) * step[name]
        torch.testing.assert_close(tensor, average)
        assert not torch.equal(average, steps[-1][name])
    learner.published()
    gate = learner.gate()
    assert gate is not None and gate.running == gate.candidate
    learner.begin_again(start)
    for name, tensor in learner.candidate().items():
        assert torch.equal(tensor, start[name])


def test_a_gate_gives_way() -> None:
    learner = Learner(drafter(), frozen(), filled(), SETTINGS, torch.device("cpu"))
    for _ in range(6):
        learner.micro_step()
    looks = iter([True, True, True, False])
    assert learner.gate(lambda: next(looks)) is None
    assert learner.gate_is_due()
    assert learner.gate() is not None
    assert not learner.gate_is_due()
