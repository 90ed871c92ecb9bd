"""`tlt top` and `tlt status`: a view of a server, its drafter and the devices, live or once.

Runs in a process of its own, and draws the snapshots of `snapshot`. It changes nothing.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.observe import fleet, snapshot
from tlt_sglang.observe.events import Json
from tlt_sglang.observe.snapshot import Snapshot, tokens_per_s

INTERVAL = 1.0
"""Seconds between two snapshots."""


def top(argv: Sequence[str]) -> int:
    """Run `tlt top` and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return main(["top", *argv])


def status(argv: Sequence[str]) -> int:
    """Run `tlt status` and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return main(["status", *argv])


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with and return its exit status."""
    try:
        return commands.run(argv[0], _watch, argv)
    except KeyboardInterrupt:
        return 0


def _watch(argv: Sequence[str]) -> None:
    command, rest = argv[0], argv[1:]
    # The flags of both commands, of which only `status` draws a picture.
    when = "live" if command == "top" else "once"
    parser = Parser(f"tlt {command}", f"Show what a server does, {when}.")
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:30000",
        metavar="URL",
        help="Address of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--fleet", type=Path, metavar="STORE", help="Show all engines of the fleet of this store"
    )
    flags.add_flag(parser, SETTINGS["coordinator"])
    parser.add_argument(
        "--api-key", default="", metavar="KEY", help="Admin key of the server (default: none)"
    )
    if command == "status":
        parser.add_argument(
            "--svg", type=Path, metavar="FILE", help="Draw the status to an SVG file"
        )
    if commands.print_help(parser, rest):
        return
    args = parser.parse_args(rest)

    if args.fleet is not None:
        store = args.fleet.absolute()
        _show(args, lambda: fleet.take(store, args.api_key), fleet.view)
        return

    def look() -> Snapshot:
        return snapshot.take(args.url, args.api_key, args.tlt_coordinator)

    def begin() -> Snapshot:
        # A server that does not answer is an error only at the beginning.
        first = look()
        if first.status is None:
            raise ConfigError(
                f"No server with TLT answers at {args.url}; start one, or give --url."
            )
        return first

    _show(args, look, view, begin)


T = TypeVar("T")
View = Callable[[T, T | None], Panel]


def _show(
    args: argparse.Namespace,
    look: Callable[[], T],
    view: View[T],
    begin: Callable[[], T] | None = None,
) -> None:
    """Print what `look` returns, once, or draw it to a file, or follow it; `begin` looks first."""
    first = (begin or look)()
    if "svg" not in args:
        _follow(first, look, view)
    elif args.svg is None:
        Console().print(view(first, None))
    else:
        time.sleep(INTERVAL)  # for the speed
        _draw(view(look(), first), args.svg)


def _follow(before: T, look: Callable[[], T], view: View[T]) -> None:
    """Show one snapshot after the other until the user interrupts."""
    with Live(view(before, None), refresh_per_second=4, screen=True) as live:
        while True:
            time.sleep(INTERVAL)
            now = look()
            live.update(view(now, before))
            before = now


def _draw(panel: Panel, path: Path) -> None:
    """Write a panel to an SVG file; raise EnvironmentProblem if that is not possible."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(panel)
    try:
        console.save_svg(str(path), title="tlt top")
    except OSError as error:
        raise EnvironmentProblem(
            f"The picture {path} cannot be written ({error.strerror}); give --svg another file."
        ) from error
    print(path)


def view(now: Snapshot, before: Snapshot | None) -> Panel:
    """Return the view of a snapshot; speeds count from the snapshot `before`."""
    if now.status is None:
        return Panel("the server does not answer", title="tlt top")
    parts: list[str | Table] = [_head(now, tokens_per_s(now, before)), _strategies(now.scheduler)]
    if now.scheduler.get("store"):
        parts.append(_drafter(now.scheduler, now.sidecar))
    if now.devices:
        states = "   ".join(f"{name}: {state}" for name, state in sorted(now.devices.items()))
        parts.append(f"[bold]devices[/]  {states}")
    return Panel(Group(*parts), title="TLT-SGLang", border_style="cyan")


def _head(now: Snapshot, speed: float | None) -> str:
    running = now.load.get("num_running_reqs", "?")
    queued = now.load.get("num_waiting_reqs", "?")
    rate = "" if speed is None else f"   [bold]tokens/s[/] {speed:.1f}"
    strategy, length = now.scheduler.get("strategy"), now.scheduler.get("accept_length")
    return (
        f"[bold]running[/] {running}   [bold]queued[/] {queued}{rate}   [bold]strategy[/] "
        f"[green]{strategy}[/]   [bold]accept length[/] {length}"
    )


def _strategies(scheduler: Json) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "verify steps", "proposed", "accepted", "accept length"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for name, tally in (scheduler.get("strategies") or {}).items():
        steps = tally["verify_steps"]
        length = f"{1 + tally['accepted'] / steps:.2f}" if steps else "-"
        table.add_row(
            name, f"{steps:,}", f"{tally['proposed']:,}", f"{tally['accepted']:,}", length
        )
    return table


def _drafter(scheduler: Json, sidecar: Json) -> str:
    # The version that the engine drafts with.
    swap = scheduler.get("swap") or {}
    line = f"[bold]drafter[/] version {scheduler.get('drafter_version')}"
    if swap.get("rolled_back"):
        line += f", {swap['rolled_back']} rolled back"
    if not sidecar:
        return line + "   [bold]sidecar[/] none"
    # The sidecar that trains the next one, and its last gate.
    activity = "[green]training[/]" if sidecar.get("training") else "waiting"
    line += f"   [bold]sidecar[/] {activity}, step {sidecar.get('step')}"
    line += f", loss {sidecar.get('loss')}"
    gate = sidecar.get("gate")
    if gate:
        line += f", accept length {gate['running']:.2f} -> {gate['candidate']:.2f}"
    return line
