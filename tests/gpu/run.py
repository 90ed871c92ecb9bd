"""Check and time everything on one GPU: `python -m tests.gpu.run OUT`, twelve minutes.

Every part writes one JSON line to OUT/results.jsonl as soon as it is done, most telling parts
first. A part that fails or runs out of its time says why, and the next one begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.graph_memory import graph_memory
from tests.gpu.kernels import kernels
from tests.gpu.online import harvest_and_swap, release
from tests.gpu.profile import profile
from tests.gpu.session import Part, Session, environment
from tests.gpu.settings import ON_GPU, REHEARSAL
from tests.gpu.start import identity, start
from tests.gpu.steps import acceptance, costs, overlap

SECONDS = 720.0
PARTS = (
    Part("k", "kernels of the noise", 90, kernels),
    Part("a", "start of the default pool", 240, start),
    Part("b", "identity under random switches", 180, identity),
    Part("c", "steps of a dummy 8B shape", 300, costs),
    Part("c2", "steps of the default model", 150, acceptance),
    Part("d", "graph memory against the plan", 120, graph_memory),
    Part("e", "harvest, sidecar and hot swap under load", 180, harvest_and_swap),
    Part("f", "release, publish, resume", 120, release),
    Part("g", "overlap scheduling", 120, overlap),
    Part("h", "profile of a step", 120, profile),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if one of them failed."""
    args = _parser().parse_args(argv)
    parts = {part.key: part for part in PARTS}
    keys_to_run = args.parts.split(",") if args.parts else list(parts)
    unknown = set(keys_to_run) - set(parts)
    if unknown:
        keys = ", ".join(parts)
        print(f"Unknown part {min(unknown)!r}; the parts are {keys}.", file=sys.stderr)
        return 2
    settings = REHEARSAL if args.rehearse else ON_GPU
    if args.model:
        settings = dataclasses.replace(settings, model=args.model)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with Session(args.folder.resolve(), settings, args.seconds, shlex.split(args.flags)) as session:
        session.say(environment() | {"rehearsal": args.rehearse, "flags": settings.server_flags})
        for key in keys_to_run:
            session.run(parts[key])
        return 1 if session.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests.gpu.run",
        description="Check and time everything on one GPU. The parts: "
        + ", ".join(f"{part.key} {part.title}" for part in PARTS)
        + ".",
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="Folder for results and logs")
    add = parser.add_argument
    add("--seconds", type=float, default=SECONDS, metavar="N", help="Time for all parts in seconds")
    add("--parts", metavar="KEY[,KEY]", help="Parts to run, in this order (default: all)")
    add("--model", metavar="MODEL", help="Model with a drafter (default: smollm2-135m)")
    add("--flags", default="", metavar="FLAGS", help="Flags for every server, as one word")
    add("--rehearse", action="store_true", help="Run the same code on CPU with small sizes")
    return parser


if __name__ == "__main__":
    sys.exit(main())
