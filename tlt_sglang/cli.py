"""`tlt`: the command line beside the server.

tlt check                  is this environment sound? what is missing, in words
tlt prepare smollm2-135m   make the default model ready and print its folder
tlt data ...               make prompts to train a drafter on
tlt plan ...               which graphs a pool of strategies needs, and their memory
tlt train ...              train a drafter on the target's own answers
tlt top, tlt status        what a server does, live or once
tlt report EVENTS          a page of what an engine did, from its event log
tlt seed ...               begin a drafter of a target's last layer (a store does it by itself)
tlt sidecar ...            trains the drafter of a store while engines run
tlt coordinator ...        tells trainers when a device is theirs
tlt serve ...              the same as python -m tlt_sglang.launch_server ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tlt_sglang import __version__
from tlt_sglang.config.config import Device
from tlt_sglang.errors import TltError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status: 0 done, 1 a problem (one sentence), 2 bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:
        from tlt_sglang.launch_server import main as serve

        return serve(argv[1:])
    if argv[:1] in (["train"], ["data"]):
        from tlt_sglang.training.commands import main as learn

        return learn(argv)
    if argv[:1] == ["plan"]:
        from tlt_sglang.graphs.commands import main as plan

        return plan(argv[1:])
    if argv[:1] in (["top"], ["status"]):
        from tlt_sglang.observe.top import main as watch

        return watch(argv)
    if argv[:1] == ["report"]:
        from tlt_sglang.observe.report import main as report

        return report(argv[1:])
    if argv[:1] == ["seed"]:
        from tlt_sglang.training.seed import main as begin

        return begin(argv[1:])
    if argv[:1] == ["sidecar"]:
        from tlt_sglang.sidecar.service import main as train_online

        return train_online(argv[1:])
    if argv[:1] == ["coordinator"]:
        from tlt_sglang.coordinator.commands import main as coordinate

        return coordinate(argv[1:])
    parser = argparse.ArgumentParser(prog="tlt", description="TLT-SGLang.")
    parser.add_argument("--version", action="version", version=f"tlt-sglang {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("serve", help="start the server (see tlt serve --help)")
    commands.add_parser("plan", help="graphs and their memory (see tlt plan --help)")
    commands.add_parser("data", help="make prompts to train on (see tlt data --help)")
    commands.add_parser("train", help="train a drafter (see tlt train --help)")
    commands.add_parser("top", help="what a server does, live (see tlt top --help)")
    commands.add_parser("status", help="the same, once")
    commands.add_parser("report", help="a page of an event log (see tlt report --help)")
    commands.add_parser("seed", help="begin a drafter (see tlt seed --help)")
    commands.add_parser("sidecar", help="train while engines run (see tlt sidecar --help)")
    commands.add_parser("coordinator", help="who may train, when (see tlt coordinator --help)")
    check = commands.add_parser("check", help="is this environment sound? what is missing?")
    check.add_argument("--device", choices=["cpu", "cuda"], help="default: what this machine has")
    prepare = commands.add_parser("prepare", help="make a model ready and print its folder")
    prepare.add_argument("model", help="smollm2-135m")
    args = parser.parse_args(argv)
    try:
        return _check(args.device) if args.command == "check" else _prepare(args.model)
    except TltError as error:
        print(f"tlt: {error}", file=sys.stderr)
        return 1


def _check(device: Device | None) -> int:
    from tlt_sglang.launch_server import has_accelerator
    from tlt_sglang.launcher.environment import check

    if device is None:
        device = "cuda" if has_accelerator() else "cpu"
    findings = check(device)
    print(f"TLT-SGLang {__version__}, for {'a GPU' if device == 'cuda' else 'this CPU'}:")
    for finding in findings:
        mark = "ok     " if finding.sound else "MISSING" if finding.needed else "note   "
        print(f"  {mark}  {finding.text}")
    missing = [finding for finding in findings if finding.needed and not finding.sound]
    if missing:
        print(f"Not sound: {len(missing)} of {len(findings)} checks failed.")
        return 1
    print("Sound: an engine can start here.")
    return 0


def _prepare(name: str) -> int:
    from tlt_sglang.models.named import prepare
    from tlt_sglang.models.shipped import default_drafter

    folder = prepare(name)
    default_drafter(name)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
