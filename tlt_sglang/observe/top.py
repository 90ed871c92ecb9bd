"""`tlt top`: a live view of a server, its drafter and who may train; `tlt status`: it once."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table

from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.coordinator.client import query_status
from tlt_sglang.errors import ConfigError, EnvironmentProblem

EVERY = 1.0


@dataclass(frozen=True)
class Look:
    """What is known at a moment."""

    at: float
    status: dict[str, Any] | None
    """`GET /tlt/status`; None where nobody answers."""
    load: dict[str, Any]
    """Of `GET /v1/loads`, its first engine."""
    sidecar: dict[str, Any]
    """STORE/sidecar.json."""
    devices: dict[str, str]
    """States that the coordinator tells."""


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
    when = "live" if command == "top" else "once"
    parser = Parser(f"tlt {command}", f"Show what a server does, {when}.")
    parser.add_argument(
        "--url",
        default="http://127.0.0.1:30000",
        metavar="URL",
        help="Address of the server (default: %(default)s)",
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

    def look() -> Look:
        return seen(args.url, args.api_key, args.tlt_coordinator)

    first = look()
    if first.status is None:
        raise ConfigError(f"No server with TLT answers at {args.url}; start one, or give --url.")
    if command == "status":
        if args.svg is None:
            Console().print(view(first, None))
        else:
            time.sleep(EVERY)  # for the speed
            _draw(view(look(), first), args.svg)
        return
    with Live(view(first, None), refresh_per_second=4, screen=True) as live:
        before = first
        while True:
            time.sleep(EVERY)
            now = look()
            live.update(view(now, before))
            before = now


def _draw(shown: Panel, path: Path) -> None:
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(shown)
    try:
        console.save_svg(str(path), title="tlt top")
    except OSError as error:
        raise EnvironmentProblem(
            f"The picture {path} cannot be written ({error.strerror}); give --svg another file."
        ) from error
    print(path)


def seen(url: str, key: str, coordinator: str | None) -> Look:
    """Ask everybody."""
    status = _get(f"{url}/tlt/status", key)
    loads = _get(f"{url}/v1/loads", key) or {}
    first = ((status or {}).get("schedulers") or [{}])[0]
    sidecar: dict[str, Any] = {}
    if first.get("store"):
        try:
            sidecar = json.loads((Path(first["store"]) / "sidecar.json").read_text())
        except (OSError, ValueError):
            sidecar = {}
    told = query_status(coordinator, wait=0.3) if coordinator else None
    load = (loads.get("loads") or [{}])[0]
    return Look(time.monotonic(), status, load, sidecar, {} if told is None else told.states)


def view(now: Look, before: Look | None) -> Panel:
    """What is shown; `before` is the look that speeds are reckoned from."""
    if now.status is None:
        return Panel("the server does not answer", title="tlt top")
    first = (now.status.get("schedulers") or [{}])[0]
    parts: list[Any] = [_head(now, first, _speed(now, before)), _strategies(first)]
    if first.get("store"):
        parts.append(_drafter(first, now.sidecar))
    if now.devices:
        states = "   ".join(f"{name}: {state}" for name, state in sorted(now.devices.items()))
        parts.append(f"[bold]devices[/]  {states}")
    return Panel(Group(*parts), title="TLT-SGLang", border_style="cyan")


def _head(now: Look, first: dict[str, Any], speed: float | None) -> str:
    running = now.load.get("num_running_reqs", "?")
    queued = now.load.get("num_waiting_reqs", "?")
    rate = "" if speed is None else f"   [bold]tokens/s[/] {speed:.1f}"
    return (
        f"[bold]running[/] {running}   [bold]queued[/] {queued}{rate}   [bold]strategy[/] "
        f"[green]{first.get('strategy')}[/]   [bold]accept length[/] {first.get('accept_length')}"
    )


def _strategies(first: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "verify steps", "proposed", "accepted", "accept length"):
        table.add_column(name, justify="left" if name == "strategy" else "right")
    for name, tally in (first.get("strategies") or {}).items():
        rounds = tally["rounds"]
        length = f"{1 + tally['accepted'] / rounds:.2f}" if rounds else "-"
        table.add_row(
            name, f"{rounds:,}", f"{tally['proposed']:,}", f"{tally['accepted']:,}", length
        )
    return table


def _drafter(first: dict[str, Any], sidecar: dict[str, Any]) -> str:
    swap = first.get("swap") or {}
    told = f"[bold]drafter[/] version {first.get('drafter_version')}"
    if swap.get("rolled_back"):
        told += f", {swap['rolled_back']} rolled back"
    if not sidecar:
        return told + "   [bold]sidecar[/] none"
    doing = "[green]training[/]" if sidecar.get("training") else "waiting"
    told += f"   [bold]sidecar[/] {doing}, step {sidecar.get('step')}, loss {sidecar.get('loss')}"
    gate = sidecar.get("gate")
    if gate:
        told += f", accept length {gate['running']:.2f} -> {gate['candidate']:.2f}"
    return told


def _speed(now: Look, before: Look | None) -> float | None:
    if before is None or before.status is None or now.status is None or now.at <= before.at:
        return None
    return max(0.0, (_made(now) - _made(before)) / (now.at - before.at))


def _made(look: Look) -> int:
    found = 0
    for scheduler in (look.status or {}).get("schedulers") or []:
        for tally in (scheduler.get("strategies") or {}).values():
            found += tally["rounds"] + tally["accepted"]
    return found


def _get(url: str, key: str) -> dict[str, Any] | None:
    request = urllib.request.Request(url)
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
    except (OSError, ValueError, urllib.error.URLError):
        return None
    return found
