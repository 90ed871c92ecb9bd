"""Sampled answers are those of plain decoding, token for token, whatever lies in between.

A pool under the random policy answers eight requests at a time while its drafter is swapped twenty
times; requests join and leave, some are aborted and asked for again with their first tokens, a KV
pool that is too small retracts others, and halfway the server is killed by SIGKILL and started
again. `make identity` asks for 2,000 answers.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import provenance
from tests.engine.test_coupled import COUPLED
from tests.engine.test_live import uses
from tests.support.prompts import prompts
from tests.support.seeded import Clients, SeededRequest, tie
from tests.support.servers import MODEL, Server, Servers, model_folder
from tlt_sglang.models.shipped import default_drafter
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store

POOL = "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:3x4x8,ngram:4"
TOKENS, SWAPS, AT_ONCE = 128, 20, 8
SCARCE = ("--max-total-tokens", "700", "--schedule-conservativeness", "0.05")
OVERCOMMITTED = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "8"}
"""Requests are let in as if their answers had eight tokens, so that some are retracted."""
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "notes": {"type": "array", "items": {"type": "string"}, "minItems": 6},
        },
        "required": ["name", "notes"],
    }
)
WAYS: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "0.7 with top-p": {"temperature": 0.7, "top_p": 0.95},
    "top-k": {"temperature": 1.0, "top_k": 50},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "JSON grammar": {"temperature": 1.0, "json_schema": SCHEMA},
}


def requests_of(count: int) -> list[SeededRequest]:
    """Return requests whose prompts repeat, and whose ways take turns; each has its own seed."""
    short = [prompt for prompt in prompts() if len(prompt) < 100]
    ways = list(WAYS)
    chosen = [
        (short[i // len(ways) % len(short)], ways[i % len(ways)], 7919 * i) for i in range(count)
    ]
    return [
        SeededRequest(way, prompt, WAYS[way] | {"sampling_seed": seed}, TOKENS)
        for prompt, way, seed in chosen
    ]


def plainly(server: Server, batch: Sequence[SeededRequest]) -> list[list[int]]:
    """Return the answers of plain decoding."""
    with ThreadPoolExecutor(2 * AT_ONCE) as threads:
        answers = list(threads.map(lambda one: server.post("/generate", one.body()), batch))
    return [answer["output_ids"] for answer in answers]


def store_of(folder: Path) -> Store:
    """Return a store with two versions of the shipped drafter, of which one is worse."""
    drafter = default_drafter(MODEL)
    assert drafter is not None
    weights = describe.load(drafter)
    shape = describe.target_config(str(model_folder(MODEL)))
    base, store = describe.expected(drafter, shape, "BF16").base, Store(folder)
    for factor in (0.9, 1.0):
        store.publish({name: factor * one for name, one in weights.items()}, "eagle3", base)
    return store


class Trouble:
    """Swaps the drafter at even intervals while clients wait, and kills the server once."""

    def __init__(self, servers: Servers, store: Store, count: int) -> None:
        self._servers, self._store, self._count, self._kills = servers, store, count, 0
        self.swaps, self.switches = 0, 0
        self.steps: Counter[str] = Counter()
        self.clients = Clients(self._start())
        self.clients.up.set()

    def _start(self) -> Server:
        flags = (*COUPLED, *SCARCE, "--tlt-policy", "random", "--stream-interval", "8")
        store = ("--tlt-store", str(self._store.root))
        return self._servers.get(POOL, *flags, *store, environment=OVERCOMMITTED)

    def play(self, futures: Sequence[Future[list[int]]]) -> None:
        """Swap and kill as answers get ready, until all are."""
        while not all(future.done() for future in futures):
            ready = self.clients.counts["done"]
            if not self._kills and ready >= self._count // 2:
                self._kill()
            elif self.swaps < SWAPS and ready >= self.swaps * self._count // SWAPS:
                self._swap()
            time.sleep(0.02)
        while self.swaps < SWAPS:
            self._swap()
        self._note()

    def _swap(self) -> None:
        version = 1 + self.swaps % 2
        self.clients.server.post("/tlt/drafter", {"version": version})
        # Versions are taken between two steps, so that an idle server takes none.
        if uses(self.clients.server, version, 5):
            self.swaps += 1

    def _kill(self) -> None:
        self._note()
        self.clients.up.clear()
        self._kills += 1
        del self._servers.running[self.clients.server.spec]
        self.clients.server.kill()
        self.clients.server = self._start()
        self.clients.up.set()

    def _note(self) -> None:
        """Add the counts of a server before it ends."""
        scheduler = self.clients.server.scheduler()
        self.switches += scheduler["switches"]
        for name, tally in scheduler["strategies"].items():
            self.steps[name] += tally["verify_steps"]


def test_answers_are_those_of_plain_decoding(
    servers: Servers, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    count = int(pytestconfig.getoption("--answers"))
    batch, rng = requests_of(count), random.Random(0)
    abort = [number % 5 == 2 and one.goes_on for number, one in enumerate(batch)]
    expected = plainly(servers.get("off", *COUPLED), batch)
    trouble = Trouble(servers, store_of(tmp_path / "store"), count)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        futures = [
            threads.submit(trouble.clients.whole, one, rng.randrange(8, 100) if aborts else None)
            for one, aborts in zip(batch, abort, strict=True)
        ]
        trouble.play(futures)
    answers = [future.result() for future in futures]

    # Every answer that differs has to do so at a tie, and those are counted.
    off = servers.get("off", *COUPLED)
    differ = [i for i, answer in enumerate(answers) if answer != expected[i]]
    ties = {i: tie(off, batch[i], expected[i], answers[i]) for i in differ}
    counts = trouble.clients.counts
    summary = {
        "answers": count,
        "tokens": sum(map(len, answers)),
        "identical": count - len(differ),
        "ties": sum(gap is not None for gap in ties.values()),
        "swaps": trouble.swaps,
        "switches": trouble.switches,
        "kills": 1,
        **{name: counts[name] for name in ("aborted", "lost", "retracted")},
    }
    ways = Counter(one.way for one in batch)
    content = {"ways": ways, "verify_steps": trouble.steps, "gaps": list(ties.values())}
    print(json.dumps(summary | content))
    if path := pytestconfig.getoption("--answers-json"):
        document = provenance.document("sampled_identity", summary, **content)
        provenance.write_json(Path(path), document)
    assert [batch[i] for i, gap in ties.items() if gap is None] == []
    assert set(trouble.steps) == set(POOL.split(",")) and all(trouble.steps.values())
    assert trouble.swaps >= SWAPS and min(counts.values()) > 0, counts
