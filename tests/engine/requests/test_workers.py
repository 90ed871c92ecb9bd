"""Several tokenizer workers: each has the patches and the routes, and reports the same figures."""

from __future__ import annotations

import pytest

from tests.support.identity import POOL, Reference
from tests.support.servers import Server, Servers

WORKERS = 2
CALLS = 12
"""New connections, which the kernel spreads over the workers."""


@pytest.fixture
def several(servers: Servers, drafters: dict[str, str]) -> Server:
    return servers.get(POOL, "--tokenizer-worker-num", str(WORKERS), drafter=drafters["eagle"])


def test_every_worker_serves_the_routes(several: Server, reference: Reference) -> None:
    several.post("/tlt/strategy", {"strategy": "ngram:4"})
    steps = 0
    for call in range(CALLS):
        prompt = call % len(reference.prompts)
        answer = several.generate(reference.prompts[prompt], 24)
        reference.compare(prompt, answer["output_ids"], 24)
        status = several.status()
        assert status["strategy"] == "ngram:4"
        (scheduler,) = status["schedulers"]
        now = scheduler["strategies"]["ngram:4"]["verify_steps"]
        assert now >= steps + answer["meta_info"]["spec_verify_ct"] > steps
        steps = now
    several.post("/tlt/strategy", {"strategy": None})
    for _ in range(CALLS):
        refusal = several.request("POST", "/tlt/strategy", json={"strategy": "abacus"})
        assert refusal.status_code == 400 and "Unknown strategy" in refusal.text


def test_every_worker_refuses_bad_requests(several: Server) -> None:
    for _ in range(CALLS):
        answer = several.request("POST", "/generate", json={"input_ids": [49152]})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("input_ids contains 49152;")
    several.wait_until_idle()
