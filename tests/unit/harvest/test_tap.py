"""A reader gets what the engine logs: tokens, positions and features of one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
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
