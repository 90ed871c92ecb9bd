"""The drafter that comes with the default model: lossless, and as good as it is said to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.identity import LENGTH, Reference
from tests.support.servers import MODEL, Servers
from tlt_sglang.models import shipped
from tlt_sglang.models.named import prepare
from tlt_sglang.training import evaluate, offline, ship
from tlt_sglang.training.corpus import Prompt, Response
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.training.target import Target

STRATEGY = "eagle3:3x1x4"
SOURCE = shipped.HERE / MODEL

Record = Callable[[str, object], None]


def predicted(texts: list[tuple[list[int], list[int]]], folder: Path) -> float:
    """The accept length of a chain of three on these texts, without an engine."""
    target = Target(str(prepare(MODEL)), torch.device("cpu"))
    weights = load_file(folder / "model.safetensors")
    draft_ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
    config = DraftConfig.for_target(target.config, "eagle3", len(draft_ids))
    drafter = Drafter(config)
    offline.load_weights(drafter, folder)
    responses = [Response(Prompt(tuple(prompt)), tuple(output)) for prompt, output in texts]
    sequences = [sequence for group in target.sequences(responses, config) for sequence in group]
    return evaluate.accept_length(drafter, target.frozen(draft_ids), sequences, steps=3).mean


def test_greedy_output_and_the_accept_length_that_is_predicted(
    servers: Servers, reference: Reference, record_property: Record
) -> None:
    server = servers.get(None, "--adaptive-spec", "--tlt-strategies", STRATEGY)
    folder = server.status()["drafter"]
    assert folder == str(shipped.default_drafter(MODEL))
    texts = reference.texts()[::4]
    answers = server.generate_all([prompt for prompt, _ in texts], max_new_tokens=LENGTH)
    ties = [reference.compare(4 * i, answer["output_ids"]) for i, answer in enumerate(answers)]
    record_property("ties", len(ties) - ties.count(None))
    report = [answer["meta_info"] for answer in answers]
    rounds = sum(info["spec_verify_ct"] for info in report)
    measured = sum(info["completion_tokens"] - 1 for info in report) / rounds
    expected = predicted(texts, Path(folder))
    record_property("measured", round(measured, 3))
    record_property("predicted", round(expected, 3))
    assert measured > 1.3
    assert measured == pytest.approx(expected, rel=0.03)
    server.wait_until_idle()


def test_its_provenance() -> None:
    """How it was made is written beside it: command, data and curve; and it is small."""
    training = json.loads((SOURCE / "training.json").read_text())
    assert training["options"]["model"] == MODEL
    assert training["curve"] and training["accept_length"]
    assert sum(kind["tokens"] for kind in training["data"].values()) > 100_000
    assert (SOURCE / shipped.WEIGHTS).stat().st_size <= ship.MOST_BYTES
