"""Part (d): the memory that the graphs of each state took, against the plan's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tests.gpu.session import Line, Session
from tests.gpu.settings import DUMMY, POOL
from tlt_sglang.graphs.model_plan import plan_for_model
from tlt_sglang.graphs.plan import Use, needs
from tlt_sglang.graphs.sizes import ModelSizes
from tlt_sglang.models.drafter_checkpoint import read_config
from tlt_sglang.models.shipped import default_drafter
from tlt_sglang.strategy.strategies import parse

CAPTURE = re.compile(
    r"Capture (?P<graphs>.+?) end\. (?:bs=\[.*?\], )?"
    r"elapsed=(?P<seconds>[\d.]+) s, mem usage=(?P<gb>-?[\d.]+) GB"
)
STATE = re.compile(
    r"Built adaptive runtime state steps=(?P<steps>\d+): "
    r"elapsed=(?P<seconds>[\d.]+)s, mem=(?P<gb>-?[\d.]+)GB"
)
PLANNED = re.compile(r"chosen: (?P<graphs>\d+) graphs +(?P<gb>[\d.]+) GB")
LEARNED = [name for name in POOL if parse(name).num_steps]
"""Strategies whose states SGLang builds and logs, in that order; the others log nothing."""


def graph_memory(session: Session, line: Line) -> None:
    """Compare what SGLang logs of each state with the plan, for every pool so far."""
    if not any("pool" in name for name in session.logs):
        session.pool()
    servers: dict[str, Line] = {}
    line["servers"] = servers
    for name, log in session.logs.items():
        if "pool" in name:
            server = captured(log.read_text(errors="replace"))
            plan = _planned(session, DUMMY in name)
            server["planned_by_strategy_gb"] = plan
            if plan is not None:
                total = sum(plan[strategy] for strategy in LEARNED)
                taken = float(str(server["taken_by_states_gb"]))
                server["taken_over_planned"] = round(taken / total, 2)
            servers[name] = server


def captured(log: str) -> Line:
    """Return what a server's log says of its graphs: the plan, the states and the captures.

    SGLang's own captures come before the first state.
    """
    states = [_figures(match) for match in STATE.finditer(log)]
    if len(states) == len(LEARNED):
        states = [{"strategy": name} | state for name, state in zip(LEARNED, states, strict=True)]
    first = STATE.search(log)
    own = [_figures(m) for m in CAPTURE.finditer(log, 0, first.start() if first else len(log))]
    plan = PLANNED.search(log)
    return {
        "planned_gb": None if plan is None else float(plan["gb"]),
        "taken_by_states_gb": sum(float(str(state["gb"])) for state in states),
        "states": states,
        "before_the_states": own,
        "captures": [_figures(match) for match in CAPTURE.finditer(log)],
    }


def planned(config: Mapping[str, object], draft_vocab: int, sizes: list[int]) -> dict[str, float]:
    """Return the gigabytes that each strategy's graphs take by the plan, shared with none."""
    pool = [parse(name) for name in POOL]
    plan = plan_for_model(pool, config, draft_vocab=draft_vocab, batch_sizes=sizes)
    model = ModelSizes.from_config(config, draft_vocab)
    return {
        str(strategy): round(
            model.memory({g for size in batch_sizes for g in needs(Use(strategy, size))}) / 1e9, 3
        )
        for strategy, batch_sizes in plan.captured().items()
    }


def _planned(session: Session, is_dummy: bool) -> dict[str, float] | None:
    """Return the plan for the model of a server; None if its drafter is not the shipped one."""
    sizes, shape = list(session.settings.graph_sizes), session.settings.dummy
    if is_dummy:
        return planned(shape, shape["draft_vocab_size"], sizes)
    folder = default_drafter(session.model)
    config = read_config(session.model, "model")
    drafter = None if folder is None else read_config(str(folder), "drafter")
    if config is None or drafter is None:
        return None
    return planned(config, drafter["draft_vocab_size"], sizes)


def _figures(match: re.Match[str]) -> Line:
    words = match.groupdict()
    return words | {name: float(words.pop(name)) for name in ("seconds", "gb")}
