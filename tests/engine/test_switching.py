"""Strategies that change between any two decode steps, with requests in flight."""

from __future__ import annotations

from collections.abc import Callable

from identity import LENGTH, Reference
from servers import Servers

POOL = "off,eagle:3x1x4,eagle:1x1x2,eagle:3x4x8,ngram:4"

Record = Callable[[str, object], None]


def test_greedy_output_stays_the_same(
    servers: Servers, drafters: dict[str, str], reference: Reference, record_property: Record
) -> None:
    """Requests join and leave a batch of eight while the strategy changes every few steps."""
    server = servers.get(POOL, "--tlt-policy", "random", drafter=drafters["eagle"])
    answers = server.generate_all(reference.prompts, at_once=8, max_new_tokens=LENGTH)
    ties = reference.compare_all(answers)
    record_property("ties", len(ties))
    status = server.status()["schedulers"][0]
    used = status["strategies"]
    record_property("strategies", used)
    record_property("switches", status["switches"])
    assert set(used) == set(POOL.split(","))
    assert all(told["rounds"] > 20 for told in used.values())
    lengths = {name: 1 + told["accepted"] / told["rounds"] for name, told in used.items()}
    assert lengths["off"] == 1.0
    # The drafter comes back warm from plain steps: what it knows by heart is accepted.
    # Alone the chain of three has 2.47 on these texts.
    assert lengths["eagle:3x1x4"] > 0.9 * 2.47
    assert lengths["eagle:3x4x8"] > lengths["eagle:3x1x4"] > lengths["eagle:1x1x2"] > 1.4
    server.wait_until_idle()


def test_a_strategy_can_be_pinned(
    servers: Servers, drafters: dict[str, str], reference: Reference
) -> None:
    server = servers.get(POOL, "--tlt-policy", "random", drafter=drafters["eagle"])
    for strategy in ("eagle:3x4x8", "off"):
        server.post("/tlt/strategy", {"strategy": strategy})
        before = server.status()["schedulers"][0]
        reference.compare(3, server.generate(reference.prompts[3], LENGTH)["output_ids"])
        after = server.status()["schedulers"][0]
        assert after["pinned"] == after["strategy"] == strategy
        assert after["switches"] - before["switches"] <= 1
    server.post("/tlt/strategy", {"strategy": None})
    assert server.status()["schedulers"][0]["pinned"] is None
    refused = server.request("POST", "/tlt/strategy", json={"strategy": "ngram:16"})
    assert refused.status_code == 400
    assert "does not have the strategy ngram:16" in refused.text
