"""Harvest and hot swap on the simulated device: no wait in a step, and nothing lost."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda.apart import apart
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import Record

MOST_TOKENS = 90
"""Length of the longest prompt."""


LENGTH = 40


@apart
def test_the_log_of_a_pool(tmp_path: Path) -> None:
    """Tokens and hidden states of each sampled request, by chains, a tree and plain decoding.

    Our part of a step waits for nothing, allocates no pinned memory but for small indices, and
    leaves the writing to a thread.
    """
    from tests.cuda import calls, device
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process
    from tlt_sglang.harvest.record import request_key
    from tlt_sglang.harvest.writer import Writer

    pool = "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:3x4x8"
    engine = Engine(tmp_path, strategies=pool, policy="random", store=str(tmp_path / "store"))
    online = process.require().step.online_drafter
    assert online is not None and online.tap is not None
    expected, writer = engine.expected(LENGTH), online.tap.writer
    names = [str(len(prompt)) for prompt in engine.prompts]
    keys = {request_key(name): row for row, name in enumerate(names)}

    # Half of the requests are sampled: those with the smaller keys.
    writer.sampling = (sorted(int.from_bytes(key[:4], "little") for key in keys)[1] + 1) / 2**32
    sampled = sorted(keys[key] for key in keys if writer.wants(key))
    assert len(sampled) == 2

    threads: set[str] = set()
    pinned: list[int] = []
    sequences: list[LoggedSequence] = []
    write, pin = Writer.write, device.pin

    def note_thread(log: Writer, record: Record) -> bool:
        threads.add(threading.current_thread().name)
        return write(log, record)

    def note_pinned(tensor: torch.Tensor) -> torch.Tensor:
        stack = traceback.extract_stack()
        if any("tlt_sglang/harvest" in frame.filename for frame in stack):
            pinned.append(tensor.nbytes)
        return pin(tensor)

    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(Writer, "write", note_thread)
    monkeypatch.setattr(calls, "pin", note_pinned)
    DEVICE.waits.clear()
    reader = Reader.open(writer.path)
    assert engine.generate(LENGTH) == expected
    engine.scheduler.on_idle()
    assembler, deadline = Assembler(1 << 30), time.monotonic() + 60
    while len(sequences) < 2 and time.monotonic() < deadline:
        sequences += [one for record in reader.read() for one in assembler.add(record)]
    reader.close()

    head = engine.models.model.lm_head.weight.detach()
    assert sorted(keys[bytes.fromhex(one.request)] for one in sequences) == sampled
    for one in sequences:
        row = keys[bytes.fromhex(one.request)]
        text = engine.prompts[row] + expected[row]
        assert one.ended and one.start == 0
        assert one.ids.tolist() == text[:-1]
        # The last hidden state of each position predicts the next token of the answer.
        features = torch.from_numpy(one.features.view(np.int16)).view(torch.bfloat16)
        predicted = (features[:, -head.shape[1] :].float() @ head.T).argmax(-1).tolist()
        answer = len(engine.prompts[row]) - 1
        agreed = [a == b for a, b in zip(predicted[answer:], text[answer + 1 :], strict=True)]
        assert sum(agreed) >= 0.9 * LENGTH
    ours = [wait for wait in DEVICE.waits if wait.file.startswith("tlt_sglang/harvest")]
    assert not ours, Counter(ours)
    assert threads == {"tlt-harvest"}
    assert all(size <= 8 * MOST_TOKENS for size in pinned), pinned
    assert len(online.tap._requests) == 0
    monkeypatch.undo()
    online.close()
    assert not writer.path.exists()


@apart
def test_harvest_and_hot_swap(tmp_path: Path) -> None:
    """A version that is published under load is drafted with, and changes no token.

    One that is published while the memory is released waits for the memory.
    """
    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process
    from tlt_sglang.weights import describe
    from tlt_sglang.weights.store import Store

    pool = "off,eagle3:1x1x2,eagle3:3x1x4"
    engine = Engine(tmp_path, strategies=pool, policy="random", store=str(tmp_path / "store"))
    from sglang.srt.managers.io_struct import (
        ReleaseMemoryOccupationReqInput,
        ResumeMemoryOccupationReqInput,
    )

    online = process.require().step.online_drafter
    assert online is not None
    expected = engine.expected(40)
    assert engine.generate(40) == expected
    drafter = Path(engine.models.drafters["eagle3"])
    base = describe.expected(drafter, describe.target_config(engine.models.path), "F32").base
    weights = {name: weight * 1.01 for name, weight in describe.load(drafter).items()}

    def wait_for(version: int) -> None:
        deadline = time.monotonic() + 60
        while online.swap.version != version and time.monotonic() < deadline:
            assert engine.generate(40) == expected
        assert online.swap.version == version, online.status()

    DEVICE.waits.clear()
    store = Store(tmp_path / "store")
    version = store.publish(weights, "eagle3", base)
    wait_for(version)
    status = online.status()
    assert status["harvest"]["written"] > 0, status
    ours = [wait for wait in DEVICE.waits if wait.file.startswith("tlt_sglang")]
    assert not ours, Counter(ours)

    # Nothing is written to memory that is released.
    updater = engine.scheduler.weight_updater
    updater.release_memory_occupation(ReleaseMemoryOccupationReqInput())
    later = store.publish(weights, "eagle3", base)
    for _ in range(20):
        engine.scheduler.on_idle()
        time.sleep(0.1)
    assert online.swap.version == version
    updater.resume_memory_occupation(ResumeMemoryOccupationReqInput())
    wait_for(later)
    online.close()


@apart
def test_an_update_of_the_target(tmp_path: Path) -> None:
    """Its embedding and head are published, and no step waits for them."""
    from safetensors.torch import load_file

    from tests.cuda.device import DEVICE
    from tests.cuda.engine import Engine
    from tlt_sglang.engine import engine as process

    pool = "off,eagle3:1x1x2"
    engine = Engine(tmp_path, strategies=pool, policy="random", store=str(tmp_path / "store"))
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    online = process.require().step.online_drafter
    assert online is not None and online.harvester is not None and online.tap is not None
    model = engine.models.model
    before = engine.expected(LENGTH)
    assert engine.generate(LENGTH) == before
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.mul_(1.25)
    updated = tmp_path / "updated"
    model.save_pretrained(updated)

    update = UpdateWeightFromDiskReqInput(model_path=str(updated), load_format="auto")
    result = engine.scheduler.weight_updater.update_weights_from_disk(update)
    assert result.success, result.message
    expected = engine.expected(LENGTH)
    assert expected != before
    DEVICE.waits.clear()
    assert engine.generate(LENGTH) == expected
    ours = [wait for wait in DEVICE.waits if wait.file.startswith("tlt_sglang")]
    assert not ours, Counter(ours)
    assert online.tap.version == 1
    deadline = time.monotonic() + 60
    while not online.harvester.announcement.embed_and_head and time.monotonic() < deadline:
        time.sleep(0.01)
    weights = load_file(online.harvester.announcement.embed_and_head or "")
    for name, own in (("embedding", model.model.embed_tokens), ("head", model.lm_head)):
        rows = own.weight.detach().to(torch.bfloat16)
        assert torch.equal(weights[name][: len(rows)], rows)  # SGLang pads the vocabulary
    online.close()
