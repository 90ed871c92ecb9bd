"""`tlt report EVENTS -o report.html`: one self-contained page about a run, from its event log.

Runs in a process of its own, after or during a run. It reads files only, and asks no server.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from tlt_sglang import __version__
from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.observe import events
from tlt_sglang.observe.events import Events, Interval, Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #d9dee3; }
svg { width: 100%; height: auto; } .note { color: #5a6570; }
"""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return commands.run("report", _report, argv)


def _report(argv: Sequence[str]) -> None:
    parser = Parser("tlt report", "Write a page about a run, from its event log.")
    parser.add_argument(
        "events", type=Path, metavar="EVENTS", help="Event log, the file of --tlt-events"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="File to write the page to (default: report.html)",
    )
    flags.add_flag(parser, SETTINGS["store"])
    if commands.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    # The log, and the sidecar's gates if there is a store.
    log = events.read(args.events)
    gates = events.training(Path(args.tlt_store) / "training.jsonl") if args.tlt_store else ()
    text = page(log, gates, str(args.events))
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"The report {args.out} cannot be written ({error.strerror}); give -o another file."
        ) from error
    print(args.out)


def page(log: Events, gates: Sequence[Json], source: str) -> str:
    """Return the page as HTML; raise ConfigError if matplotlib is missing."""
    # The head: the log's name, its span, and a table of strategies.
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>TLT-SGLang: {html.escape(source)}</title><style>{_STYLE}</style>",
        f"<h1>TLT-SGLang: {html.escape(source)}</h1>",
        f"<p class=note>{_span(log)}; tlt-sglang {__version__}"
        + (f"; {log.skipped} lines could not be read" if log.skipped else "")
        + "</p><h2>Strategies</h2>",
        _table(
            ("strategy", "verify steps", "tokens", "accept length", "share of tokens", "switches"),
            _rows(log),
        ),
    ]
    # A picture for each engine, and one of the drafter's training.
    for pid, intervals in log.engines.items():
        parts += [f"<h2>Engine {pid}</h2>", _picture(intervals, log.strategies)]
    if gates:
        parts += ["<h2>The drafter's training</h2>", _training(gates)]
    return "\n".join(parts) + "\n"


def _span(log: Events) -> str:
    times = [interval.time for intervals in log.engines.values() for interval in intervals]
    begin, end = (datetime.fromtimestamp(at, UTC) for at in (min(times), max(times)))
    return f"{begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC, {len(log.engines)} engine(s)"


def _rows(log: Events) -> list[tuple[str, ...]]:
    totals = log.totals()
    all_tokens = sum(total.tokens for total in totals) or 1
    return [
        (
            total.strategy,
            f"{total.verify_steps:,}",
            f"{total.tokens:,}",
            f"{total.tokens / total.verify_steps:.2f}" if total.verify_steps else "-",
            f"{100 * total.tokens / all_tokens:.1f} %",
            f"{total.switches:,}",
        )
        for total in totals
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _picture(intervals: Sequence[Interval], strategies: Sequence[str]) -> str:
    """Draw tokens a second by strategy, running requests and accept length over time."""
    pyplot = _pyplot()
    begin = intervals[0].time
    times = [interval.time - begin for interval in intervals]
    figure, (speed, running, length) = pyplot.subplots(
        3, 1, figsize=(11, 6.2), sharex=True, height_ratios=(3, 1.3, 1.3)
    )
    layers = [[interval.tokens_per_s_of(name) for interval in intervals] for name in strategies]
    speed.stackplot(times, layers, labels=strategies, step="post")
    speed.set_ylabel("tokens/s")
    speed.legend(loc="upper left", fontsize=8, ncols=3)
    running.step(times, [interval.running for interval in intervals], where="post", color="0.3")
    running.set_ylabel("running")
    running.set_ylim(bottom=0)
    lengths = [interval.accept_length for interval in intervals]
    length.plot(times, lengths, ".-", ms=3, color="tab:purple")
    length.set_ylabel("accept length")
    length.set_xlabel("seconds")
    return _svg(figure)


def _training(gates: Sequence[Json]) -> str:
    """Draw loss, and accept length of candidate and version in use, over the training steps."""
    pyplot = _pyplot()
    steps = [gate.get("step") for gate in gates]
    figure, (length, loss) = pyplot.subplots(2, 1, figsize=(11, 4.6), sharex=True)
    length.plot(steps, [gate.get("running") for gate in gates], label="version in use")
    length.plot(steps, [gate.get("candidate") for gate in gates], label="candidate")
    for gate in gates:
        if gate.get("passed"):
            length.axvline(gate.get("step", 0), color="grey", lw=0.6, ls=":")
    length.set_ylabel("accept length")
    length.legend(fontsize=8)
    loss.plot(steps, [gate.get("loss") for gate in gates], color="tab:red")
    loss.set_ylabel("loss")
    loss.set_xlabel("optimizer steps (dotted: a version is published)")
    return _svg(figure)


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'The report needs matplotlib: pip install "tlt-sglang[report]".'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
