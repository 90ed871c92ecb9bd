"""Parts (c) and (g): what steps of every strategy cost, and what overlap scheduling gains."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import Server
from tests.gpu import dummy
from tests.gpu.measure import ADAPTIVE, PLAIN, Timing, decode, pinned
from tests.gpu.session import Line, Session, pool_flags
from tests.gpu.settings import CHAIN, DUMMY, POOL
from tlt_sglang.models.shipped import default_drafter
from tlt_sglang.strategy.strategies import Strategy, parse

Rows = dict[str, dict[int, Timing]]
"""Timings by strategy, then by requests at once."""


SGLANG_CHAIN = f"sglang {CHAIN}"


def costs(session: Session, line: Line) -> None:
    """Time steps of a model that has the shape of an 8B Llama."""
    shape, tokens = session.settings.dummy, session.settings.dummy_tokens
    prompts = dummy.prompts(max(session.settings.sizes), shape["vocab_size"])
    line["shape"] = shape
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        model, drafter = dummy.write(Path(folder), shape)
        names = f"pool, {DUMMY}", f"plain, {DUMMY}"
        flags = (*pool_flags(), *dummy.flags(drafter, tokens))
        pool = session.server(names[0], *flags, model=model)
        _time(session, line, rows, pool, (*POOL, ADAPTIVE), prompts)
        session.stop({names[0]})
        plain = session.server(names[1], *dummy.flags(None, tokens), model=model)
        _time(session, line, rows, plain, (PLAIN,), prompts)
        session.stop({names[1]})


def acceptance(session: Session, line: Line) -> None:
    """Time steps of the default model with its drafter, whose drafts are accepted.

    Beside plain decoding stands SGLang's own speculation with that drafter, without TLT.
    """
    prompts = session.prompts(max(session.settings.sizes))
    rows: Rows = {}
    session.begin({"plain": (), "pool": pool_flags()})
    _time(session, line, rows, session.server("plain"), (PLAIN,), prompts)
    _time(session, line, rows, session.pool(), (*POOL, ADAPTIVE), prompts)
    if (drafter := default_drafter(session.model)) is not None:
        server = session.server(SGLANG_CHAIN, *_sglang_flags(parse(CHAIN), drafter))
        _time(session, line, rows, server, (SGLANG_CHAIN,), prompts)


def overlap(session: Session, line: Line) -> None:
    """Time the default pool with and without overlap scheduling."""
    sizes = session.settings.sizes
    prompts = session.prompts(max(sizes))
    flags = {"pool": pool_flags(), "serial pool": (*pool_flags(), "--disable-overlap-schedule")}
    session.begin(flags)
    for name, words in flags.items():
        part: Line = {}
        line[name] = part
        server = session.server(name, *words)
        _time(session, part, {}, server, ("off", CHAIN), prompts, sizes[::2])


def _time(
    session: Session,
    line: Line,
    rows: Rows,
    server: Server,
    strategies: Sequence[str],
    prompts: Sequence[Prompt],
    sizes: Sequence[int] | None = None,
) -> None:
    """Time strategies at all sizes, and keep what has been measured in `line`."""
    settings = session.settings
    for size in sizes or settings.sizes:
        for strategy in strategies:
            if strategy not in (PLAIN, SGLANG_CHAIN):
                pinned(server, strategy)
            counted = strategy != SGLANG_CHAIN
            timing = decode(server, prompts[:size], settings.tokens, settings.repetitions, counted)
            rows.setdefault(strategy, {})[size] = timing
            line["rows"] = [
                {"strategy": name, "requests": requests} | row.as_json()
                for name, by_size in rows.items()
                for requests, row in by_size.items()
            ]
            line["ratios"] = ratios(rows)


def _sglang_flags(strategy: Strategy, drafter: Path) -> tuple[str, ...]:
    """Return a strategy with an EAGLE-3 drafter as SGLang's own flags."""
    return (
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", str(drafter)),
        *("--speculative-num-steps", str(strategy.num_steps)),
        *("--speculative-eagle-topk", str(strategy.topk)),
        *("--speculative-num-draft-tokens", str(strategy.num_draft_tokens)),
    )


def ratios(rows: Rows) -> dict[int, dict[str, float]]:
    """Return, by requests at once, throughputs relative to each other, where both are measured."""
    result: dict[int, dict[str, float]] = {}
    for size in sorted({size for by_size in rows.values() for size in by_size}):
        rates = {
            name: by_size[size].tokens_per_s for name, by_size in rows.items() if size in by_size
        }
        fixed = [rate for name, rate in rates.items() if name in POOL]
        pairs = {
            "off_over_plain": (rates.get("off"), rates.get(PLAIN)),
            "adaptive_over_plain": (rates.get(ADAPTIVE), rates.get(PLAIN)),
            "chain_over_sglang_chain": (rates.get(CHAIN), rates.get(SGLANG_CHAIN)),
            "adaptive_over_best_fixed": (rates.get(ADAPTIVE), max(fixed, default=None)),
        }
        result[size] = {name: round(a / b, 3) for name, (a, b) in pairs.items() if a and b}
    return result
