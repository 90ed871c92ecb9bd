"""Parts (a) and (b): the default pool starts, and is lossless."""

from __future__ import annotations

import random
import threading
import time

from benchmarks.harness.server import Server
from tests.gpu.measure import counts, equal_share, pinned
from tests.gpu.session import Line, Session, gpu_memory_mib, pool_flags
from tests.gpu.settings import POOL

SWITCH_SECONDS = 0.03
"""Time between two random switches, a few steps."""


def start(session: Session, line: Line) -> None:
    """Start the default pool, and answer with each of its strategies pinned."""
    before = gpu_memory_mib()
    began = time.monotonic()
    server = session.pool()
    line |= {"start_s": round(time.monotonic() - began, 1)}
    line |= {"memory_mib": [before, gpu_memory_mib()]}
    prompts, tokens = session.prompts(4), session.settings.tokens
    accept_lengths: dict[str, float] = {}
    line["accept_lengths"] = accept_lengths
    outputs = {}
    for strategy in POOL:
        pinned(server, strategy)
        steps, accepted = counts(server)
        outputs[strategy] = server.generate(prompts, tokens).output_ids
        after = counts(server)
        accept_lengths[strategy] = round(1 + (after[1] - accepted) / (after[0] - steps), 3)
    server.pin(None)
    # Without deterministic inference, other widths round in another order: only a hint.
    line["equal_to_off"] = {
        strategy: equal_share(outputs["off"], output) for strategy, output in outputs.items()
    }


def identity(session: Session, line: Line) -> None:
    """Compare answers under random switches: greedy ones with those of SGLang without TLT, and
    those of seeds at temperature 1 with plain decoding's.

    SGLang's deterministic inference samples by the same rule.
    """
    flags = session.settings.deterministic_flags
    servers = {"plain, deterministic": flags, "pool, deterministic": (*flags, *pool_flags())}
    session.begin(servers)
    (plain_name, plain_flags), (pool_name, pool_words) = servers.items()
    tokens = session.settings.identity_tokens
    prompts = session.prompts(session.settings.identity_prompts)
    plain = session.server(plain_name, *plain_flags)
    expected = [plain.generate(prompts, tokens, temperature=one).output_ids for one in (0, 1)]
    alone = plain.generate(prompts[:1], tokens).output_ids
    line["plain_alone_and_in_a_batch"] = equal_share(expected[0][:1], alone)
    pool = session.server(pool_name, *pool_words)
    pinned(pool, "off")
    sampled = pool.generate(prompts, tokens, temperature=1).output_ids
    over = threading.Event()
    switching = threading.Thread(target=_switch, args=(pool, over))
    switching.start()
    try:
        answers = [pool.generate(prompts, tokens, temperature=one).output_ids for one in (0, 1)]
    finally:
        over.set()
        switching.join()
    line |= {"tokens": tokens, "greedy": equal_share(expected[0], answers[0])}
    line["sampled"] = equal_share(sampled, answers[1])
    line["sampled_by_sglang"] = equal_share(expected[1], answers[1])
    status = pool.scheduler() or {}
    line |= {"switches": status.get("switches"), "strategies": status.get("strategies")}
    line["ok"] = [expected[0], sampled] == answers


def _switch(server: Server, over: threading.Event) -> None:
    """Pin one random strategy after the other, in a thread of its own, until `over`."""
    rng = random.Random(0)
    while not over.wait(SWITCH_SECONDS):
        server.pin(rng.choice(POOL))
    server.pin(None)
