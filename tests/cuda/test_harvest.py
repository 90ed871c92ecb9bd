"""Harvest and hot swap on the simulated device: no wait in a step, and nothing lost."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from tests.cuda.apart import apart


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
    engine = Engine(tmp_path, pool, policy="random", store=str(tmp_path / "store"))
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
