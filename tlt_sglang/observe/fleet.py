"""`tlt top` and `tlt status` of a fleet: a line for each engine, as found in its store.

Runs in a process of its own. Engines are asked all at once; one that does not answer has an empty
line. Different drafter versions stand side by side while a new one is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.panel import Panel
from rich.table import Table

from tlt_sglang.coordinator.status import query_status
from tlt_sglang.errors import ConfigError
from tlt_sglang.fleet.plan import Plan
from tlt_sglang.observe import snapshot
from tlt_sglang.observe.snapshot import Snapshot, tokens_per_s

AT_ONCE = 32
"""Engines that are asked at the same time."""


@dataclass(frozen=True)
class FleetSnapshot:
    """The state of a fleet at one moment."""

    engines: Mapping[str, Snapshot]
    """By the engine's name."""
    devices: Mapping[str, str]
    """States of the coordinator's devices."""


def take(store: Path, key: str) -> FleetSnapshot:
    """Return a snapshot of the fleet of `store`, with the admin key of its engines.

    Raises ConfigError where no fleet was started.
    """
    plan = Plan.read(store)
    if plan is None:
        raise ConfigError(f"No fleet runs with the store {store}; start one with tlt fleet.")
    urls = plan.urls()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        taken = threads.map(lambda url: snapshot.take(url, key, None), urls.values())
        engines = dict(zip(urls, taken, strict=True))
    world = query_status(plan.coordinator, plan.public_key, wait=0.5)
    return FleetSnapshot(engines, {} if world is None else world.states)


def view(now: FleetSnapshot, before: FleetSnapshot | None) -> Panel:
    """Return the view of a snapshot; speeds count from the snapshot `before`."""
    table = Table(box=None, pad_edge=False)
    for name in ("engine", "running", "queued", "tokens/s", "strategy", "accept length", "drafter"):
        table.add_column(name, justify="left" if name in ("engine", "strategy") else "right")
    total = 0.0
    for name, engine in sorted(now.engines.items(), key=lambda pair: _in_order(pair[0])):
        if engine.status is None:
            table.add_row(name, "[red]no answer[/]")
            continue
        speed = tokens_per_s(engine, None if before is None else before.engines.get(name))
        total += speed or 0.0
        scheduler = engine.scheduler
        table.add_row(
            name,
            str(engine.load.get("num_running_reqs", "?")),
            str(engine.load.get("num_waiting_reqs", "?")),
            "" if speed is None else f"{speed:.1f}",
            str(scheduler.get("strategy")),
            str(scheduler.get("accept_length")),
            str(scheduler.get("drafter_version", "-")),
        )
    head = f"[bold]engines[/] {len(now.engines)}"
    if before is not None:
        head += f"   [bold]tokens/s[/] {total:.1f}"
    parts: list[str | Table] = [head, table]
    if now.devices:
        states = "   ".join(f"{name}: {state}" for name, state in sorted(now.devices.items()))
        parts.append(f"[bold]devices[/]  {states}")
    return Panel(Group(*parts), title="TLT-SGLang fleet", border_style="cyan")


def _in_order(name: str) -> tuple[str, int]:
    """Return what sorts engine-2 before engine-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)
