"""The target's embedding and head leave for the sidecar while the engine serves.

They are read from the live weights, so that the next update, or the release of the memory, waits
for them. The manager of the weights is SGLang's own, and so is its way to announce an update.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from patches.from_v22.scheduler_weight_updater import select_runners
from patches.scheduler_weight_updater import release_memory_occupation
from tlt_sglang.engine import embed_and_head, engine
from tlt_sglang.engine.embed_and_head import EmbedAndHead
from tlt_sglang.engine.online_drafter import OnlineDrafter
from tlt_sglang.engine.step import SpeculationStep
from tlt_sglang.engine.weight_sync import WeightSync
from tlt_sglang.harvest.host_copies import Event, Present

pytestmark = pytest.mark.sglang


class Slow(Present):
    """Copies that begin when the test lets them."""

    def __init__(self) -> None:
        self.begins = threading.Event()

    def wait(self, ready: Event | None) -> None:
        assert self.begins.wait(10)


class Published(list[tuple[int, list[torch.Tensor]]]):
    """Collects the versions that are published."""

    def __init__(self) -> None:
        self.changed = threading.Event()

    def __call__(self, version: int, parts: list[torch.Tensor]) -> None:
        self.append((version, parts))
        self.changed.set()


@dataclass
class Online(OnlineDrafter):
    """An online drafter without a store."""

    harvester: Any = field(default_factory=SimpleNamespace)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    monkeypatch.setattr(embed_and_head, "_copies", lambda part: slow)
    yield slow
    slow.begins.set()


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def export(published: Published, monkeypatch: pytest.MonkeyPatch) -> EmbedAndHead:
    made = EmbedAndHead(published)
    online = Online(harvester=SimpleNamespace(embed_and_head=made))
    step = SpeculationStep(online_drafter=online)
    monkeypatch.setattr(engine, "current", SimpleNamespace(step=step, weight_sync=WeightSync()))
    return made


@pytest.mark.parametrize("patch", [select_runners, release_memory_occupation])
def test_an_update_or_a_release_waits_for_the_copy(
    patch: Any, export: EmbedAndHead, published: Published, copies: Slow
) -> None:
    """The weight is published as it was before the change."""
    weight = torch.ones(8, 2)
    export.begin(1, [weight], live=True)
    assert not published.changed.wait(0.05)  # and this thread is here already

    change = patch.make(lambda manager, _: weight.zero_())
    changing = threading.Thread(target=functools.partial(change, object(), "target"))
    changing.start()
    changing.join(0.05)
    assert changing.is_alive() and weight.sum() == 16
    copies.begins.set()
    changing.join(10)
    assert weight.sum() == 0 and published.changed.wait(10)
    ((version, (copy,)),) = published
    assert (version, copy.dtype, copy.sum().item()) == (1, torch.bfloat16, 16)


def test_copies_of_other_ranks_are_published_as_they_are(
    export: EmbedAndHead, published: Published, copies: Slow
) -> None:
    parts = [torch.ones(2, 2), torch.zeros(2, 2)]
    export.begin(1, parts, live=False)
    assert published.changed.wait(10)
    ((_, own),) = published
    assert [id(part) for part in own] == [id(part) for part in parts]
    export.wait()


def test_an_older_version_is_not_published_after_a_newer_one(
    export: EmbedAndHead, published: Published
) -> None:
    """One that waits for its turn to write, while another update comes, is left out."""
    with export._publishing:
        for version in (1, 2):
            export.begin(version, [torch.full((1, 1), version)], live=True)
            export.wait()
    assert published.changed.wait(10)
    assert [version for version, _ in published] == [2]


def test_a_failed_copy_is_logged_and_holds_nothing_up(
    export: EmbedAndHead,
    published: Published,
    copies: Slow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(ready: Event | None) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(copies, "wait", fail)
    export.begin(3, [torch.ones(1, 1)], live=True)
    export.wait()
    for thread in threading.enumerate():
        if thread.name == "tlt-embed-and-head":
            thread.join(10)
    assert "Embedding and head of version 3 of the target cannot be published" in caplog.text
    assert not published
