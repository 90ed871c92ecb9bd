"""`tlt report EVENTS -o report.html`: one page, with its pictures in it, of what an engine did."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tlt_sglang import __version__
from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.observe import events
from tlt_sglang.observe.events import Events, Second

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
    found = events.read(args.events)
    gates = events.training(Path(args.tlt_store) / "training.jsonl") if args.tlt_store else ()
    text = page(found, gates, str(args.events))
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(
            f"The report {args.out} cannot be written ({error.strerror}); give -o another file."
        ) from error
    print(args.out)


def page(found: Events, gates: Sequence[dict[str, Any]], source: str) -> str:
    """The whole of it. Raises ConfigError where matplotlib is missing."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>TLT-SGLang: {html.escape(source)}</title><style>{_STYLE}</style>",
        f"<h1>TLT-SGLang: {html.escape(source)}</h1>",
        f"<p class=note>{_span(found)}; tlt-sglang {__version__}"
        + (f"; {found.skipped} lines could not be read" if found.skipped else "")
        + "</p><h2>Strategies</h2>",
        _table(
            ("strategy", "verify steps", "tokens", "accept length", "share of tokens", "switches"),
            _rows(found),
        ),
    ]
    for pid, seconds in found.engines.items():
        parts += [f"<h2>Engine {pid}</h2>", _picture(seconds, found.strategies)]
    if gates:
        parts += ["<h2>The drafter's training</h2>", _training(gates)]
    return "\n".join(parts) + "\n"


def _span(found: Events) -> str:
    times = [second.time for seconds in found.engines.values() for second in seconds]
    begin, end = (datetime.fromtimestamp(at, UTC) for at in (min(times), max(times)))
    return f"{begin:%Y-%m-%d %H:%M:%S} to {end:%H:%M:%S} UTC, {len(found.engines)} engine(s)"


def _rows(found: Events) -> list[tuple[str, ...]]:
    totals = found.totals()
    every = sum(tokens for _, _, tokens, _ in totals) or 1
    return [
        (
            name,
            f"{rounds:,}",
            f"{tokens:,}",
            f"{tokens / rounds:.2f}" if rounds else "-",
            f"{100 * tokens / every:.1f} %",
            f"{switches:,}",
        )
        for name, rounds, tokens, switches in totals
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"


def _picture(seconds: Sequence[Second], strategies: Sequence[str]) -> str:
    """Tokens a second by strategy, running requests and accept length, over time."""
    pyplot = _pyplot()
    begin = seconds[0].time
    at = [second.time - begin for second in seconds]
    figure, (speed, running, length) = pyplot.subplots(
        3, 1, figsize=(11, 6.2), sharex=True, height_ratios=(3, 1.3, 1.3)
    )
    layers = [[second.tokens(name) for second in seconds] for name in strategies]
    speed.stackplot(at, layers, labels=strategies, step="post")
    speed.set_ylabel("tokens/s")
    speed.legend(loc="upper left", fontsize=8, ncols=3)
    running.step(at, [second.running for second in seconds], where="post", color="0.3")
    running.set_ylabel("running")
    running.set_ylim(bottom=0)
    length.plot(at, [second.accept_length for second in seconds], ".-", ms=3, color="tab:purple")
    length.set_ylabel("accept length")
    length.set_xlabel("seconds")
    return _svg(figure)


def _training(gates: Sequence[dict[str, Any]]) -> str:
    """Loss, and accept length of candidate and version in use, over the steps of training."""
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


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            'The report needs matplotlib: pip install "tlt-sglang[report]".'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.tight_layout()
    figure.savefig(buffer, format="svg")
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
