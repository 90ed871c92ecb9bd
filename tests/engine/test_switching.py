"""Strategies that change between any two decode steps, with requests in flight."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.fitting import Tiny
from tests.support.identity import LENGTH, PINNED, POOL, Reference
from tests.support.lacking import lacks
from tests.support.servers import Server, Servers
from tests.support.tiny import greedily
from tlt_sglang.config.settings import Config
from tlt_sglang.strategy import policies
from tlt_sglang.strategy.strategies import parse
from tlt_sglang.strategy.trace import replay

TINY = (
    *("--skip-tokenizer-init", "--enable-metrics", "--max-running-requests", "8"),
    *("--tlt-policy", "random"),
)

Record = Callable[[str, object], None]


@pytest.mark.server(PINNED)
def test_greedy_output_stays_the_same(
    servers: Servers, drafters: dict[str, str], reference: Reference, record_property: Record
) -> None:
    """Requests join and leave a batch of eight while the strategy changes every few steps."""
    server = servers.get(POOL, "--tlt-policy", "random", drafter=drafters["eagle"])
    server.post("/tlt/strategy", {"strategy": None})
    # Whole answers that an earlier test got here would be drafted by n-grams, in chains, too.
    server.post("/flush_cache")
    before = server.scheduler()
    prompts = reference.prompts[::2]
    answers = server.generate_all(prompts, at_once=8, max_new_tokens=LENGTH)
    ties = [reference.compare(2 * i, answer["output_ids"]) for i, answer in enumerate(answers)]
    record_property("ties", len(ties) - ties.count(None))
    after = server.scheduler()
    used = {
        name: {
            key: count - before["strategies"].get(name, {}).get(key, 0)
            for key, count in tally.items()
            if isinstance(count, int)
        }
        for name, tally in after["strategies"].items()
    }
    record_property("strategies", used)
    record_property("switches", after["switches"] - before["switches"])
    assert set(used) == set(POOL.split(","))
    assert all(report["verify_steps"] > 20 for report in used.values())
    lengths = {
        name: 1 + report["accepted"] / report["verify_steps"] for name, report in used.items()
    }
    assert lengths["off"] == 1.0
    # The drafter comes back warm from plain steps: what it knows by heart is accepted.
    # Alone the chain of three has 2.47 on all twenty texts.
    assert lengths["eagle:3x1x4"] > 2.1
    assert lengths["eagle:3x4x8"] > lengths["eagle:3x1x4"] > lengths["eagle:1x1x2"] > 1.4
    server.wait_until_idle()


@pytest.mark.server(PINNED)
def test_a_strategy_can_be_pinned(
    servers: Servers, drafters: dict[str, str], reference: Reference
) -> None:
    server = servers.get(POOL, "--tlt-policy", "random", drafter=drafters["eagle"])
    for strategy in ("eagle:3x4x8", "off"):
        server.post("/tlt/strategy", {"strategy": strategy})
        before = server.scheduler()
        reference.compare(3, server.generate(reference.prompts[3], LENGTH)["output_ids"])
        after = server.scheduler()
        assert after["pinned_strategy"] == after["strategy"] == strategy
        assert after["switches"] - before["switches"] <= 1
    server.post("/tlt/strategy", {"strategy": None})
    assert server.scheduler()["pinned_strategy"] is None
    refused = server.request("POST", "/tlt/strategy", json={"strategy": "ngram:16"})
    assert refused.status_code == 400
    assert "does not have the strategy ngram:16" in refused.text


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes its event log and its trace."""
    return tmp_path_factory.mktemp("told")


@pytest.fixture
def tiny_server(servers: Servers, tiny: Tiny, files: Path) -> Server:
    logs = ("--tlt-events", str(files / "events"), "--tlt-trace", str(files / "trace"))
    return servers.get(POOL, *TINY, *logs, model=tiny.path, drafter=tiny.drafters["eagle"])


def test_what_is_told_of_it(tiny_server: Server, files: Path) -> None:
    """Per request, in the event log, by Prometheus; and the trace replays to the same choices."""
    events, trace = files / "events", files / "trace"
    server = tiny_server
    server.post("/tlt/strategy", {"strategy": "eagle:3x1x4"})
    chain = server.generate([5, 6, 7], 60)["meta_info"]
    counted = not lacks("spec_accept_rate counts")
    if counted:
        assert chain["spec_num_proposed_drafts"] == 3 * chain["spec_verify_ct"]
    server.post("/tlt/strategy", {"strategy": "off"})
    plain = server.generate([6, 7, 8], 60)["meta_info"]
    if counted:
        assert plain["spec_num_proposed_drafts"] == 0
    assert plain["spec_verify_ct"] == 59
    assert plain["spec_accept_rate"] == 0
    server.post("/tlt/strategy", {"strategy": None})
    prompts = [[n, 7, 9] for n in range(3, 19)]
    answers = server.generate_all(prompts, max_new_tokens=100)
    report = server.scheduler()["strategies"].values()
    infos = [chain, plain, *(answer["meta_info"] for answer in answers)]
    for status, request in (
        *([("proposed", "spec_num_proposed_drafts")] if counted else []),
        ("verify_steps", "spec_verify_ct"),
    ):
        assert sum(one[status] for one in report) == sum(info[request] for info in infos)
    time.sleep(1)
    server.generate([5, 6, 7], 8)  # ends the second
    logged = [json.loads(line) for line in events.read_text().splitlines()]
    seconds = [event["strategies"] for event in logged if event["event"] == "summary"]
    summed = sum(tally["verify_steps"] for second in seconds for tally in second.values())
    assert summed >= sum(one["verify_steps"] for one in report)
    assert "eagle:3x1x4" in {event.get("strategy") for event in logged}
    metrics = server.get("/metrics")
    assert 'tlt_verified_tokens_total{strategy="off"}' in metrics
    policy = policies.make(Config(policy="random"), [parse(name) for name in POOL.split(",")])
    choices = list(replay(policy, trace.read_text().splitlines(keepends=True)))
    assert len(choices) > 100
    assert all(then == now for then, now in choices)


def test_two_thousand_switches(tiny_server: Server, tiny: Tiny, record_property: Record) -> None:
    """Requests of all lengths join and leave, some break off: nothing is said wrongly, or kept."""
    longest, waves = 160, 0
    chance = random.Random(0)
    prompts = torch.randint(3, tiny.vocab, (48, 12), generator=torch.Generator().manual_seed(0))
    expected = greedily(tiny.model, prompts, longest)
    server = tiny_server
    while server.scheduler()["switches"] < 2000:
        lengths = [chance.randint(1, longest) for _ in prompts]
        parameters = [
            {"temperature": 0.0, "max_new_tokens": length, "ignore_eos": True} for length in lengths
        ]
        body = {"input_ids": prompts.tolist(), "sampling_params": parameters}
        breaks_off = waves % 4 == 3
        with ThreadPoolExecutor(1) as threads:
            wave = threads.submit(server.post, "/generate", body)
            if breaks_off:
                time.sleep(0.5)
                server.post("/abort_request", {"abort_all": True})
            answers = wave.result()
        for answer, reference_output, length in zip(answers, expected, lengths, strict=True):
            got = answer["output_ids"]
            if not breaks_off:
                assert len(got) == length
            assert got == reference_output[: len(got)]
        waves += 1
    used = server.scheduler()["strategies"]
    record_property("waves", waves)
    record_property("strategies", used)
    assert waves > 4
    assert all(report["verify_steps"] > 1000 for report in used.values())
    assert used["eagle:3x4x8"]["accepted"] > used["eagle:3x4x8"]["verify_steps"] / 4
    server.wait_until_idle()  # no KV slot is held
