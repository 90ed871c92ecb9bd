"""The adaptive drafter in a real engine: what it logs, and versions that come and go under load."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_weights import checksums
from tests.support.identity import LENGTH, Reference
from tests.support.servers import Server, Servers, model_folder
from tlt_sglang.harvest.assemble import Assembler, LoggedSequence
from tlt_sglang.harvest.reader import Reader
from tlt_sglang.harvest.record import request_key
from tlt_sglang.launcher.child_process import wait_for
from tlt_sglang.training.corpus import Prompt, Response
from tlt_sglang.training.models import DraftConfig
from tlt_sglang.training.target import Target
from tlt_sglang.weights import describe
from tlt_sglang.weights.manifest import Base
from tlt_sglang.weights.store import WEIGHTS, Store

Fitted = tuple[dict[str, torch.Tensor], Base]
POOL = "off,eagle3:3x1x4,eagle3:3x4x8,ngram:4"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def fitted(drafters: dict[str, str]) -> Fitted:
    """Weights of the drafter that knows the reference by heart, and what it is made for."""
    folder = Path(drafters["eagle3"])
    shape = describe.target_config(str(model_folder("smollm2-135m")))
    return describe.load(folder), describe.expected(folder, shape, "F32").base


@pytest.fixture
def server(servers: Servers, drafters: dict[str, str], store: Store) -> Server:
    return servers.get(
        POOL, "--tlt-policy", "random", "--tlt-store", str(store.root), drafter=drafters["eagle3"]
    )


def uses(server: Server, version: int, seconds: float) -> bool:
    """Return True if the server uses this version of its drafter in time."""
    return wait_for(lambda: bool(server.scheduler()["drafter_version"] == version), seconds)


def logged(server: Server) -> dict[str, LoggedSequence]:
    """The longest sequence of each request in the server's log."""
    reader = Reader.open(Path(server.scheduler()["harvest"]["path"]))
    assembler = Assembler(1 << 30)
    sequences = [one for record in reader.read(1 << 20) for one in assembler.add(record)]
    sequences += assembler.flush()
    assert (reader.overwritten, reader.torn) == (0, 0)
    reader.close()
    return {sequence.request: sequence for sequence in sorted(sequences, key=len)}


def test_the_log_is_what_the_target_computes(server: Server, reference: Reference) -> None:
    """Tokens, positions and features of every strategy, against transformers' own."""
    server.post("/flush_cache")
    prompts = [*reference.prompts[:6], reference.prompts[0][:40] + reference.prompts[1][:9]]
    names = [f"logged-{number}" for number in range(len(prompts))]
    answers = [
        server.generate(prompt, 40, options={"rid": name})
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert wait_for(lambda: all(sequence.ended for sequence in logged(server).values()), 10)
    target = Target(str(model_folder("smollm2-135m")), torch.device("cpu"))
    config = DraftConfig.for_target(target.config, "eagle3", 1024)
    sequences = logged(server)
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        sequence = sequences[request_key(name).hex()]
        whole = [*prompt, *answer["output_ids"]]
        # What the radix cache had is left out; the last token was sampled and never read.
        cached = answer["meta_info"]["cached_tokens"]
        assert sequence.start == cached
        assert sequence.ids.tolist() == whole[sequence.start : -1]
        assert sequence.prompt_length == len(prompt) - cached
        response = Response(Prompt(tuple(prompt)), tuple(answer["output_ids"]))
        ((computed,),) = target.sequences([response], config)
        bits = torch.from_numpy(sequence.features.view(np.int16)).view(torch.bfloat16).float()
        reference_output = torch.cat([computed.features, computed.head_input], dim=-1).float()
        rows = reference_output[sequence.start : sequence.end]
        assert bits.shape == rows.shape
        error = (bits - rows).norm(dim=-1) / rows.norm(dim=-1)
        assert float(error.max()) < 0.02, name
    assert sequences[request_key(names[-1]).hex()].start > 0


def test_twenty_swaps_under_load(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """Output stays, the target's weights stay, and a swap costs no more than a step."""
    weights, base = fitted
    before = checksums(server, "target")
    last = max(store.versions(), default=0)
    answers: list[dict[str, Any]] = []
    prompts = [*reference.prompts, *reference.prompts[:4]]

    def load() -> None:
        answers.extend(server.generate_all(prompts, at_once=8, max_new_tokens=LENGTH))

    thread = threading.Thread(target=load)
    thread.start()
    for number in range(20):
        noise = 1 + 0.001 * (number % 3)
        changed = {name: tensor * noise for name, tensor in weights.items()}
        version = store.publish(changed, "eagle3", base)
        assert uses(server, version, 20), server.scheduler()
    thread.join()
    swaps = server.scheduler()["swap"]["swaps"]
    assert [version for version, _ in swaps][-20:] == list(range(last + 1, last + 21))
    ties = [
        reference.compare(number % len(reference.prompts), answer["output_ids"])
        for number, answer in enumerate(answers)
    ]
    assert len(ties) == len(prompts)
    assert checksums(server, "target") == before
    versions = [answer["meta_info"]["drafter_version"] for answer in answers]
    assert all(one == sorted(one) for one in versions)
    assert len({version for one in versions for version in one}) > 10
    milliseconds = statistics.median(ms for _, ms in swaps)
    started = time.monotonic()
    server.post("/tlt/strategy", {"strategy": "off"})
    server.generate(reference.prompts[0], 32)
    server.post("/tlt/strategy", {"strategy": None})
    step = 1000 * (time.monotonic() - started) / 32
    assert milliseconds < step
    assert server.scheduler()["swap"]["rolled_back"] == 0
    server.wait_until_idle()


def test_by_hand(server: Server, store: Store) -> None:
    """Versions are loaded, pinned and rejected by request; a bad order is one sentence."""
    newest = max(store.versions())
    for version in (newest - 1, 0, newest):
        server.post("/tlt/drafter", {"version": version})
        assert uses(server, version, 10)
    server.post("/tlt/drafter", {"rollback": True})
    assert uses(server, newest - 1, 10)
    assert store.rejected(newest)
    server.post("/tlt/drafter", {"version": None})
    for body, says in (
        ({"version": 999999}, "does not exist"),
        ({"version": "new"}, 'Write {\\"version\\": N}'),
        ({}, 'Write {\\"version\\": N}'),
    ):
        refused = server.request("POST", "/tlt/drafter", json=body)
        assert refused.status_code == 400
        assert says in refused.text


def test_damaged_versions_are_refused(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """Truncated, bit-flipped, not finite, of another shape or target: the engine goes on."""
    weights, base = fitted
    used = server.scheduler()["drafter_version"]
    bad = {}
    for what in ("truncated", "flipped"):
        bad[what] = store.publish(weights, "eagle3", base)
        path = store.path(bad[what]) / WEIGHTS
        data = bytearray(path.read_bytes())
        if what == "truncated":
            del data[-1000:]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
    worse = {name: tensor * float("nan") for name, tensor in weights.items()}
    bad["not finite"] = store.publish(worse, "eagle3", base)
    cut = {name: tensor[:-1] for name, tensor in weights.items()}
    bad["of another shape"] = store.publish(cut, "eagle3", base)
    bad["for another target"] = store.publish(weights, "eagle3", Base(1, 2, 3, 4))
    assert wait_for(
        lambda: all(str(v) in server.scheduler()["swap"]["refused"] for v in bad.values()),
        20,
    ), server.scheduler()
    assert server.scheduler()["drafter_version"] == used
    reference.compare(2, server.generate(reference.prompts[2], 40)["output_ids"], 40)


def test_a_worse_drafter_is_rolled_back(
    server: Server, store: Store, fitted: Fitted, reference: Reference
) -> None:
    """The guard sees what the gate did not; what the engine says stays the same."""
    server.post("/tlt/strategy", {"strategy": "eagle3:3x1x4"})
    server.generate_all(reference.prompts, at_once=8, max_new_tokens=48)
    used = server.scheduler()["drafter_version"]
    weights, base = fitted
    noise = torch.Generator().manual_seed(0)
    worse = {
        name: torch.randn(tensor.shape, generator=noise) * 0.02 for name, tensor in weights.items()
    }
    version = store.publish(worse, "eagle3", base)
    assert uses(server, version, 20)
    answers = server.generate_all(reference.prompts, at_once=8, max_new_tokens=48)
    for number, answer in enumerate(answers):
        reference.compare(number, answer["output_ids"], 48)
    server.post("/tlt/strategy", {"strategy": None})
    assert server.scheduler()["drafter_version"] == used
    assert server.scheduler()["swap"]["rolled_back"] == 1
    assert store.rejected(version)
