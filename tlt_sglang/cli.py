"""`tlt`: the command line beside the server. `COMMANDS` lists its commands; `tlt --help` prints it.

Imports a command's module only to run it, so that `tlt check` works where SGLang is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from tlt_sglang import __version__
from tlt_sglang.config import command_line
from tlt_sglang.config.settings import Device


@dataclass(frozen=True)
class Command:
    """One command of `tlt`."""

    name: str
    help: str
    target: str
    """The function that runs it, as MODULE:NAME: arguments to exit status."""

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the function."""
        module, _, name = self.target.partition(":")
        function: Callable[[Sequence[str]], int] = getattr(import_module(module), name)
        return function


COMMANDS = (
    Command("serve", "Serve a model", "tlt_sglang.launch_server:main"),
    Command("check", "Check that an engine can start in this environment", "tlt_sglang.cli:check"),
    Command("prepare", "Prepare a model and print its folder", "tlt_sglang.cli:prepare"),
    Command("top", "Show what a server does, live", "tlt_sglang.observe.top:top"),
    Command("status", "Show what a server does, once", "tlt_sglang.observe.top:status"),
    Command(
        "report", "Write a page about a run, from its event log", "tlt_sglang.observe.report:main"
    ),
    Command(
        "replay",
        "Send logged requests again, and compare the answers",
        "tlt_sglang.observe.replay:main",
    ),
    Command(
        "plan",
        "Plan the CUDA graphs of several strategies, and their memory",
        "tlt_sglang.graphs.commands:main",
    ),
    Command("data", "Generate prompts for training", "tlt_sglang.training.commands:data"),
    Command(
        "train", "Train a drafter on the target's own answers", "tlt_sglang.training.commands:train"
    ),
    Command(
        "seed", "Create a drafter from the target's last layer", "tlt_sglang.training.seed:main"
    ),
    Command(
        "sidecar",
        "Train the drafter of a weight store while engines run",
        "tlt_sglang.sidecar.service:main",
    ),
    Command(
        "export",
        "Serve harvest logs to sidecars on other machines",
        "tlt_sglang.exporter.commands:main",
    ),
    Command(
        "coordinator",
        "Share devices between inference and training",
        "tlt_sglang.coordinator.commands:main",
    ),
    Command(
        "fleet",
        "Run engines, trainers and a coordinator on a Ray cluster",
        "tlt_sglang.fleet.commands:main",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"tlt-sglang {__version__}")
        return 0
    for command in COMMANDS:
        if command.name == name:
            return command.load()(argv[1:])
    problem = f"unknown command {name!r}" if name else "a command is missing"
    print(f"tlt: {problem}; choose from {', '.join(c.name for c in COMMANDS)}.", file=sys.stderr)
    return 2


def usage() -> str:
    """Return the text of `tlt --help`."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.help}" for command in COMMANDS]
    return "\n".join(
        (
            "usage: tlt [--version] COMMAND ...",
            "",
            "TLT-SGLang: adaptive speculative decoding on SGLang.",
            "",
            "commands:",
            *lines,
            "",
            "tlt COMMAND --help explains a command.",
        )
    )


def check(argv: Sequence[str]) -> int:
    """Run `tlt check`; its exit status is 1 where a check fails."""
    failed: list[str] = []
    status = command_line.run("check", lambda words: failed.extend(_check(words)), argv)
    return status or (1 if failed else 0)


def _check(argv: Sequence[str]) -> list[str]:
    """Print what was checked and return the failed checks."""
    parser = command_line.Parser("tlt check", "Check that an engine can start in this environment.")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="Device to check for (default: the machine's)"
    )
    if command_line.print_help(parser, argv):
        return []
    from tlt_sglang.launcher.environment import check, has_accelerator

    device: Device | None = parser.parse_args(argv).device
    if device is None:
        device = "cuda" if has_accelerator() else "cpu"
    results = check(device)
    print(f"TLT-SGLang {__version__}, for {'a GPU' if device == 'cuda' else 'this CPU'}:")
    for result in results:
        mark = "ok     " if result.passed else "MISSING" if result.required else "note   "
        print(f"  {mark}  {result.text}")
    failed = [result.text for result in results if result.required and not result.passed]
    if failed:
        print(f"Not sound: {len(failed)} of {len(results)} checks failed.")
    else:
        print("Sound: an engine can start here.")
    return failed


def prepare(argv: Sequence[str]) -> int:
    """Run `tlt prepare`."""
    return command_line.run("prepare", _prepare, argv)


def _prepare(argv: Sequence[str]) -> None:
    parser = command_line.Parser("tlt prepare", "Prepare a model and print its folder.")
    parser.add_argument("model", metavar="MODEL", help="Model to prepare: smollm2-135m")
    if command_line.print_help(parser, argv):
        return
    from tlt_sglang.models.named import prepare
    from tlt_sglang.models.shipped import default_drafter

    model = parser.parse_args(argv).model
    folder = prepare(model)
    default_drafter(model)
    print(folder)


if __name__ == "__main__":
    sys.exit(main())
