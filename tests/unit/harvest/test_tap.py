"""A reader gets what the engine logs: tokens, positions and features of one another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tlt_sglang.harvest import logged
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.host_copies import Copied
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import PROMPT, request_key
from tlt_sglang.harvest.tap import Tap
from tlt_sglang.harvest.writer import Writer

SIZE = 3


@dataclass
class Request:
    """As SGLang has them, as far as it is looked at."""

    rid: str
    over: bool = False
    origin_input_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    finished_len: int | None = None

    def finished(self) -> bool:
        return self.over


@dataclass
class Event:
    """A CUDA event, reached when the test says so."""

    reached: bool = False

    def query(self) -> bool:
        return self.reached


@dataclass
class Copies:
    """Copies that are under way until their event is reached."""

    events: list[Event] = field(default_factory=list)
    owned: list[Sequence[bool]] = field(default_factory=list)

    def __call__(self, tensors: Sequence[torch.Tensor], owned: Sequence[bool]) -> Copied:
        self.events.append(Event())
        self.owned.append(owned)
        return [tensor.clone() for tensor in tensors], self.events[-1]


@pytest.fixture
def copies() -> Copies:
    return Copies()


@pytest.fixture
def overlapped(tmp_path: Path, copies: Copies) -> Iterator[Tap]:
    """A tap as on a GPU: the copy of the step before is under way when the next is launched."""
    writer = Writer.create(1 << 20, SIZE, "bfloat16", tmp_path)
    yield Tap(writer, torch.device("cpu"), copies)
    writer.close()


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    writer = Writer.create(1 << 20, SIZE, "bfloat16", tmp_path)
    yield Tap(writer, torch.device("cpu"))
    writer.close()


def sequences(tap: Tap) -> list[LoggedSequence]:
    reader = Reader.open(tap.writer.path)
    assembler = Assembler(1 << 20)
    records = [sequence for record in reader.read() for sequence in assembler.add(record)]
    records += assembler.flush()
    reader.close()
    return records


def features(*numbers: float) -> torch.Tensor:
    """[T, 3]: each row says which token it is of."""
    return torch.tensor(numbers).unsqueeze(-1).expand(-1, SIZE).contiguous()


def first_column(sequence: LoggedSequence) -> list[float]:
    bits = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16)
    return bits[:, 0].tolist()


def test_a_request_from_its_prompt_to_its_end(tap: Tap) -> None:
    one, other = Request("one"), Request("other")
    prompts = torch.tensor([10, 11, 12, 20, 21])
    tap.prefill([one, other], prompts, [0, 0], [3, 2], features(10, 11, 12, 20, 21), None)
    # The token that was sampled last, and two drafts, of which one and two are accepted.
    tap.decode(
        [one, other],
        torch.tensor([[13, 14, 99], [22, 23, 24]]),
        torch.tensor([3, 2]),
        torch.tensor([2, 3]),
        features(13, 14, 99, 22, 23, 24),
        None,
    )
    # The text ended with the first draft: what was accepted after it is no part of it.
    one.over, one.origin_input_ids, one.output_ids = True, (10, 11, 12), (13, 14, 99)
    one.finished_len = 2
    tap.decode(
        [other], torch.tensor([[25]]), torch.tensor([5]), torch.tensor([1]), features(25), None
    )
    records = {sequence.request: sequence for sequence in sequences(tap)}
    first, second = (records[request_key(name).hex()] for name in ("one", "other"))
    assert first.ids.tolist() == first_column(first) == [10, 11, 12, 13]
    assert second.ids.tolist() == first_column(second) == [20, 21, 22, 23, 24, 25]
    assert (first.start, first.prompt_length, first.ended) == (0, 3, True)
    assert (second.start, second.prompt_length, second.ended) == (0, 2, False)


def test_what_the_radix_cache_had_is_no_part_of_it(tap: Tap) -> None:
    request = Request("one")
    tap.prefill([request], torch.tensor([15, 16]), [5], [2], features(15, 16), None)
    (sequence,) = sequences(tap)
    assert (sequence.start, sequence.ids.tolist(), sequence.prompt_length) == (5, [15, 16], 2)


def test_a_prompt_in_chunks(tap: Tap) -> None:
    request = Request("one")
    tap.prefill([request], torch.tensor([1, 2]), [0], [2], features(1, 2), None)
    tap.prefill([request], torch.tensor([3]), [2], [1], features(3), None)
    (sequence,) = sequences(tap)
    assert (sequence.ids.tolist(), sequence.prompt_length) == ([1, 2, 3], 3)


def test_last_hidden_states_follow_the_features(tmp_path: Path) -> None:
    writer = Writer.create(1 << 20, 2, "bfloat16", tmp_path)
    tap = Tap(writer, torch.device("cpu"))
    tap.prefill(
        [Request("one")], torch.tensor([7]), [0], [1], torch.tensor([[1.0]]), torch.tensor([[2.0]])
    )
    (sequence,) = sequences(tap)
    values = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16)
    assert values.tolist() == [[1.0, 2.0]]
    writer.close()


def test_versions_of_the_target_are_told_apart(tap: Tap) -> None:
    request = Request("one")
    tap.prefill([request], torch.tensor([1]), [0], [1], features(1), None)
    tap.start_version()
    tap.decode(
        [request], torch.tensor([[2]]), torch.tensor([1]), torch.tensor([1]), features(2), None
    )
    assert [(sequence.target_version, sequence.ids.tolist()) for sequence in sequences(tap)] == [
        (0, [1]),
        (1, [2]),
    ]


def test_only_sampled_requests_are_logged(tap: Tap) -> None:
    tap.writer.sampling = 0.25
    for number in range(200):
        tap.prefill([Request(str(number))], torch.tensor([1]), [0], [1], features(1), None)
    assert 25 < len(sequences(tap)) < 80
    assert tap.status()["written"] + tap.status()["sampled_out"] == 200


def test_the_end_is_told_when_the_engine_is_idle(tap: Tap) -> None:
    request = Request("one")
    tap.prefill([request], torch.tensor([1]), [0], [1], features(1), None)
    tap.drain()
    assert not sequences(tap)[0].ended
    request.over, request.origin_input_ids, request.output_ids = True, (1,), (2,)
    tap.drain()
    assert sequences(tap)[0].ended
    reader = Reader.open(tap.writer.path)
    assert [record.flags & PROMPT for record in reader.read()] == [PROMPT, 0]
    reader.close()


def decode(tap: Tap, start: int, *requests: Request) -> None:
    """A verify step of one token for each request."""
    size = len(requests)
    tap.decode(
        requests,
        torch.full((size, 1), start),
        torch.full((size,), start),
        torch.ones(size, dtype=torch.int64),
        features(*[start] * size),
        None,
    )


def test_a_request_ends_while_the_engine_is_busy(overlapped: Tap, copies: Copies) -> None:
    """Some copy is always under way, and the request is computed once more after its last token."""
    one, other = Request("one", origin_input_ids=(0,)), Request("other")
    for start in range(3):
        decode(overlapped, start, one, other)
    one.over, one.output_ids = True, (7, 8)  # as the first two steps have found
    for start in range(3, 6):
        for event in copies.events:
            event.reached = True
        decode(overlapped, start, other)
        assert len(overlapped._pending) == 1
    records = {sequence.request: sequence for sequence in sequences(overlapped)}
    first = records[request_key("one").hex()]
    assert (first.ended, first.ids.tolist()) == (True, [0, 1])
    assert not records[request_key("other").hex()].ended
    assert len(overlapped._requests) == 1


def test_a_request_that_was_aborted_while_it_waited_ends(
    tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logged, "STALE_STEPS", 3)
    decode(tap, 0, Request("one"), Request("other"))
    for start in range(1, 6):
        decode(tap, start, Request("other"))
    assert len(tap._requests) == 1


def test_a_long_prompt_is_split(tap: Tap) -> None:
    most = tap.writer.most_tokens
    count = most + 5
    tap.prefill([Request("one")], torch.arange(count), [0], [count], features(*range(count)), None)
    (sequence,) = sequences(tap)
    assert sequence.ids.tolist() == list(range(count))
    assert sequence.prompt_length == count
    assert tap.status() | {"written": 2, "too_large": 0} == tap.status()


def test_the_last_tokens_of_a_prompt_beyond_the_log_are_copied(
    overlapped: Tap, copies: Copies
) -> None:
    most = 2 * overlapped.writer.most_tokens
    count = most + 10
    numbers = torch.arange(count)
    values = numbers.unsqueeze(-1).expand(-1, SIZE)
    requests = [Request("one"), Request("other"), Request("third")]
    overlapped.prefill(requests, numbers, [0, 4, 0], [3, 9, count - 12], values, None)
    (step,) = overlapped._pending
    assert len(step.tokens) == most
    assert step.starts.tolist() == [3, 11, 0]
    assert step.counts.tolist() == step.width == [0, 2, count - 12]


def test_only_what_others_write_into_is_copied_twice(overlapped: Tap, copies: Copies) -> None:
    one, rows = Request("one"), features(1).bfloat16()
    for last in (None, rows[:, :0]):
        overlapped.prefill([one], torch.tensor([1]), [0], [1], rows, last)
    assert [flags[-1] for flags in copies.owned] == [False, True]
