"""A reader gets what the engine logs: tokens, positions and features of one another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tlt_sglang.harvest import logged, step_writer
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.host_copies import Event, Present
from tlt_sglang.harvest.log_size import PENDING_BYTES
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import PROMPT, request_key
from tlt_sglang.harvest.rows import Span, rows_of
from tlt_sglang.harvest.step_writer import MOST_PENDING, Step, StepThread, StepWriter
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


class Copies(Present):
    """Copies that are under way until the test lets them arrive."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.problem: Exception | None = None

    def wait(self, ready: Event | None) -> None:
        assert self.arrived.wait(10)
        if self.problem is not None:
            raise self.problem

    def pieces(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """A buffer of four rows, which the next piece overwrites."""
        buffer = torch.empty(4, rows.shape[1], dtype=rows.dtype)
        for first in range(0, len(rows), 4):
            part = rows[first : first + 4]
            yield first, buffer[: len(part)].copy_(part)


@pytest.fixture
def copies() -> Copies:
    return Copies()


@pytest.fixture
def overlapped(tmp_path: Path, copies: Copies) -> Iterator[Tap]:
    """A tap as on a GPU: a thread writes steps when their copies have arrived."""
    writer = Writer.create(1 << 20, SIZE, "bfloat16", tmp_path)
    tap = Tap(writer, torch.device("cpu"), StepThread(StepWriter(writer, copies)))
    yield tap
    copies.arrived.set()
    tap.close()


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[Tap]:
    writer = Writer.create(1 << 20, SIZE, "bfloat16", tmp_path)
    tap = Tap(writer, torch.device("cpu"))
    yield tap
    tap.close()


def prefill(tap: Tap, requests: Sequence[Request], *tensors: Any) -> None:
    chosen = tap.choose(requests)
    if chosen is not None:
        tap.prefill(chosen, *tensors)


def step(tap: Tap, requests: Sequence[Request], *tensors: Any) -> None:
    chosen = tap.choose(requests)
    if chosen is not None:
        tap.decode(chosen, *tensors)


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
    prefill(tap, [one, other], prompts, [0, 0], [3, 2], features(10, 11, 12, 20, 21), None)
    # The token that was sampled last, and two drafts, of which one and two are accepted.
    step(
        tap,
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
    step(
        tap, [other], torch.tensor([[25]]), torch.tensor([5]), torch.tensor([1]), features(25), None
    )
    records = {sequence.request: sequence for sequence in sequences(tap)}
    first, second = (records[request_key(name).hex()] for name in ("one", "other"))
    assert first.ids.tolist() == first_column(first) == [10, 11, 12, 13]
    assert second.ids.tolist() == first_column(second) == [20, 21, 22, 23, 24, 25]
    assert (first.start, first.prompt_length, first.ended) == (0, 3, True)
    assert (second.start, second.prompt_length, second.ended) == (0, 2, False)


def test_what_the_radix_cache_had_is_no_part_of_it(tap: Tap) -> None:
    request = Request("one")
    prefill(tap, [request], torch.tensor([15, 16]), [5], [2], features(15, 16), None)
    (sequence,) = sequences(tap)
    assert (sequence.start, sequence.ids.tolist(), sequence.prompt_length) == (5, [15, 16], 2)


def test_a_prompt_in_chunks(tap: Tap) -> None:
    request = Request("one")
    prefill(tap, [request], torch.tensor([1, 2]), [0], [2], features(1, 2), None)
    prefill(tap, [request], torch.tensor([3]), [2], [1], features(3), None)
    (sequence,) = sequences(tap)
    assert (sequence.ids.tolist(), sequence.prompt_length) == ([1, 2, 3], 3)


def test_last_hidden_states_follow_the_features(tmp_path: Path) -> None:
    writer = Writer.create(1 << 20, 2, "bfloat16", tmp_path)
    tap = Tap(writer, torch.device("cpu"))
    prefill(
        tap,
        [Request("one")],
        torch.tensor([7]),
        [0],
        [1],
        torch.tensor([[1.0]]),
        torch.tensor([[2.0]]),
    )
    (sequence,) = sequences(tap)
    values = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16)
    assert values.tolist() == [[1.0, 2.0]]
    writer.close()


def test_versions_of_the_target_are_told_apart(tap: Tap) -> None:
    request = Request("one")
    prefill(tap, [request], torch.tensor([1]), [0], [1], features(1), None)
    tap.start_version()
    step(
        tap, [request], torch.tensor([[2]]), torch.tensor([1]), torch.tensor([1]), features(2), None
    )
    assert [(sequence.target_version, sequence.ids.tolist()) for sequence in sequences(tap)] == [
        (0, [1]),
        (1, [2]),
    ]


def test_only_sampled_requests_are_logged(tap: Tap) -> None:
    tap.writer.sampling = 0.25
    for number in range(200):
        prefill(tap, [Request(str(number))], torch.tensor([1]), [0], [1], features(1), None)
    assert 25 < len(sequences(tap)) < 80
    assert tap.status()["written"] + tap.status()["sampled_out"] == 200


def test_the_end_is_told_when_the_engine_is_idle(tap: Tap) -> None:
    request = Request("one")
    prefill(tap, [request], torch.tensor([1]), [0], [1], features(1), None)
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
    step(
        tap,
        requests,
        torch.full((size, 1), start),
        torch.full((size,), start),
        torch.ones(size, dtype=torch.int64),
        features(*[start] * size),
        None,
    )


def written(tap: Tap, copies: Copies) -> list[LoggedSequence]:
    """Let all copies arrive and the thread end; return what the log has."""
    copies.arrived.set()
    thread = tap._steps
    assert isinstance(thread, StepThread)
    thread.close()
    return sequences(tap)


def test_a_request_ends_while_the_engine_is_busy(overlapped: Tap, copies: Copies) -> None:
    """Copies are under way throughout, and a request is computed once more after its last token."""
    one, other = Request("one", origin_input_ids=(0,)), Request("other")
    for start in range(3):
        decode(overlapped, start, one, other)
    one.over, one.output_ids = True, (7, 8)  # as the first two steps have found
    for start in range(3, 6):
        decode(overlapped, start, other)
    assert not sequences(overlapped)
    assert len(overlapped._requests) == 1
    records = {sequence.request: sequence for sequence in written(overlapped, copies)}
    first = records[request_key("one").hex()]
    assert (first.ended, first.ids.tolist()) == (True, [0, 1])
    second = records[request_key("other").hex()]
    assert (second.ended, second.ids.tolist()) == (False, [0, 1, 2, 3, 4, 5])
    reader = Reader.open(overlapped.writer.path)
    kept = [record for record in reader.read() if record.request == request_key("one")]
    assert [record.end for record in kept] == [1, 2, 2]  # what follows the end is not written
    reader.close()


def test_what_is_computed_after_the_end_is_not_taken(overlapped: Tap, copies: Copies) -> None:
    one = Request("one", origin_input_ids=(0,))
    decode(overlapped, 0, one)
    one.over, one.output_ids = True, (7,)
    decode(overlapped, 1, one)
    (sequence,) = written(overlapped, copies)
    assert (sequence.ended, sequence.ids.tolist()) == (True, [0])
    assert len(overlapped._requests) == 0


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
    prefill(tap, [Request("one")], torch.arange(count), [0], [count], features(*range(count)), None)
    (sequence,) = sequences(tap)
    assert sequence.ids.tolist() == list(range(count))
    assert sequence.prompt_length == count
    assert tap.status() | {"written": 2, "too_large": 0} == tap.status()


def test_the_last_tokens_of_a_prompt_beyond_the_log_are_taken(tap: Tap) -> None:
    most = 2 * tap.writer.most_tokens
    count = most + 10
    numbers = torch.arange(count)
    values = numbers.unsqueeze(-1).expand(-1, SIZE)
    requests = [Request("one"), Request("other"), Request("third")]
    taken: list[Step] = []
    tap._steps.put = taken.append  # type: ignore[assignment,method-assign]
    prefill(tap, requests, numbers, [0, 4, 0], [3, 9, count - 12], values, None)
    assert len(taken[0].tokens) == len(taken[0].features) == most
    first, *others = taken[0].spans
    assert (first[2], others) == (0, [(0, 11, 2), (2, 0, count - 12)])


class Bfloat16Rows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the rows of hidden states that are written on the way into the log."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {"slice", "view", "empty", "new_empty", "select", "detach", "alias", "expand"}
        name = func._schema.name.removeprefix("aten::")
        if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
            self.numbers += 0 if name in views else result.numel()
        return result


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_committed_rows_of_sampled_requests_are_taken_once(
    tmp_path: Path, copies: Copies, rate: float
) -> None:
    """Four requests, three tokens each, with last hidden states in the order of a tree."""
    writer = Writer.create(1 << 20, 2, "bfloat16", tmp_path)
    tap = Tap(writer, torch.device("cpu"), StepThread(StepWriter(writer, copies)))
    writer.sampling = rate
    requests = [Request(str(number)) for number in range(4)]
    sampled = [row for row, one in enumerate(requests) if writer.wants(request_key(one.rid))]
    assert len(sampled) == 4 if rate == 1 else 0 < len(sampled) < 4
    counts, numbers = [1, 3, 2, 3], torch.arange(12)
    nodes = numbers.flip(0)
    rows = numbers.to(torch.bfloat16).unsqueeze(-1)
    with Bfloat16Rows() as copied:
        chosen = tap.choose(requests)
        assert chosen is not None
        tokens, starts = numbers.view(4, 3), torch.tensor([0, 10, 20, 30])
        tap.decode(chosen, tokens, starts, torch.tensor(counts), rows, rows.clone()[nodes], nodes)
    # Two numbers a row; the clone and the reordering of `last` above are this test's own.
    assert copied.numbers - 24 == 2 * 3 * len(sampled)
    records = {sequence.request: sequence for sequence in written(tap, copies)}
    assert records.keys() == {request_key(requests[row].rid).hex() for row in sampled}
    for row in sampled:
        sequence = records[request_key(requests[row].rid).hex()]
        ids = list(range(3 * row, 3 * row + counts[row]))
        values = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16)
        assert sequence.ids.tolist() == ids
        assert values.tolist() == [[number, number] for number in ids]
        assert sequence.start == 10 * row
    tap.close()


def test_steps_beyond_the_limits_are_dropped_and_counted(overlapped: Tap, copies: Copies) -> None:
    for start in range(MOST_PENDING + 3):
        decode(overlapped, start, Request("one"))
    assert overlapped.status()["overrun"] == 3
    copies.arrived.set()
    thread, deadline = overlapped._steps, time.monotonic() + 10
    assert isinstance(thread, StepThread)
    while thread._written < thread._put and time.monotonic() < deadline:
        time.sleep(0.001)
    thread._put_bytes += PENDING_BYTES + 1
    decode(overlapped, 100, Request("one"))
    assert overlapped.status()["overrun"] == 4
    thread._put_bytes -= PENDING_BYTES + 1
    decode(overlapped, 101, Request("one"))
    first, second = written(overlapped, copies)
    assert (len(first.ids), second.ids.tolist()) == (MOST_PENDING, [101])


def test_an_error_of_the_thread_ends_the_log_with_a_message(
    overlapped: Tap, copies: Copies, caplog: pytest.LogCaptureFixture
) -> None:
    copies.problem = RuntimeError("an illegal memory access was encountered")
    for start in range(3):
        decode(overlapped, start, Request("one"))
    copies.arrived.set()
    overlapped._steps._thread.join(10)  # type: ignore[union-attr]
    assert overlapped.status()["error"] == "RuntimeError: an illegal memory access was encountered"
    (record,) = caplog.records
    assert "The harvest log ends here" in record.message
    decode(overlapped, 3, Request("one"))  # which nothing is kept of
    overlapped.drain()
    assert overlapped._steps._queue.empty()  # type: ignore[union-attr]


def test_closing_writes_what_is_left(overlapped: Tap, copies: Copies) -> None:
    reader = Reader.open(overlapped.writer.path)
    decode(overlapped, 0, Request("one"))
    copies.arrived.set()
    overlapped.close()
    assert [record.tokens.tolist() for record in reader.read()] == [[0]]
    assert not overlapped._steps._thread.is_alive()  # type: ignore[union-attr]
    assert not overlapped.writer.path.exists()
    reader.close()


def test_closing_gives_up_a_copy_that_does_not_arrive(
    overlapped: Tap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_writer, "CLOSE_SECONDS", 0.01)
    decode(overlapped, 0, Request("one"))
    overlapped.close()
    assert "with 1 steps unwritten" in caplog.text
    assert not overlapped.writer.path.exists()


def test_rows_of_spans_are_packed_on_a_device_and_not_on_cpu() -> None:
    """The same rows at other places: to take those between, too, is less work on CPU."""
    spans = [Span(3, 10, 2), Span(7, 0, 0), Span(8, 20, 1)]
    numbers, meta = torch.arange(12), torch.device("meta")
    rows, placed = rows_of(spans, torch.device("cpu"))
    assert rows == slice(3, 9) and placed == [(0, 10, 2), (4, 0, 0), (5, 20, 1)]
    rows, placed = rows_of(spans, meta)
    assert isinstance(rows, torch.Tensor) and rows.shape == (3,) and rows.device == meta
    assert placed == [(0, 10, 2), (2, 0, 0), (2, 20, 1)]
    rows, placed = rows_of([Span(3, 10, 2), Span(5, 20, 1)], meta)
    assert numbers[rows].tolist() == [3, 4, 5] and placed == [(0, 10, 2), (2, 20, 1)]
    assert rows_of([Span(0, 3, 0)], meta)[0] == slice(0, 0)
