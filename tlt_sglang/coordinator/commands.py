"""The command line of `tlt coordinator`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line as commands
from tlt_sglang.config.flags import Parser
from tlt_sglang.coordinator.client import ask
from tlt_sglang.coordinator.endpoints import default_endpoint, make_keys
from tlt_sglang.coordinator.server import Server
from tlt_sglang.coordinator.world import Rules
from tlt_sglang.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 1 a problem (one sentence), 2 bad usage."""
    return commands.run("coordinator", _coordinator, argv)


def _coordinator(argv: Sequence[str]) -> None:
    rules = Rules()
    parser = Parser(
        "tlt coordinator",
        "Tells trainers when a device is theirs; see docs/internals/coordinator.md.",
    )
    add = parser.add_argument
    add(
        "--endpoint",
        default=default_endpoint(),
        metavar="ADDRESS",
        help="ipc:///FOLDER/NAME or tcp://HOST:PORT (default: %(default)s)",
    )
    add(
        "--tlt-preempt-ms",
        type=commands.count,
        default=round(1000 * rules.preempt),
        metavar="MS",
        help="within which a trainer has to stop (default: %(default)s)",
    )
    add(
        "--threshold",
        type=commands.amount,
        default=rules.threshold,
        metavar="N",
        help="requests that may run beside training (default: 0)",
    )
    add(
        "--dwell-ms",
        type=commands.amount,
        default=round(1000 * rules.dwell),
        metavar="MS",
        help="calm before training starts (default: %(default)s)",
    )
    add(
        "--timeout-ms",
        type=commands.count,
        default=round(1000 * rules.timeout),
        metavar="MS",
        help="silence after which a member is forgotten (default: %(default)s)",
    )
    add("--key", type=Path, metavar="FILE", help="CURVE key; the secret one, to serve")
    add("--make-keys", type=Path, metavar="DIR", help="write such keys, and end")
    add("--status", action="store_true", help="print what the coordinator knows, and end")
    if commands.helped(parser, argv):
        return
    args = parser.parse_args(argv)
    if args.make_keys is not None:
        public, secret = make_keys(args.make_keys)
        print(f"{secret} for the coordinator, {public} for its members; keep both private.")
    elif args.status:
        _status(args.endpoint, args.key)
    else:
        _serve(args)


def _serve(args: argparse.Namespace) -> None:
    rules = Rules(
        threshold=args.threshold,
        dwell=args.dwell_ms / 1000,
        preempt=args.tlt_preempt_ms / 1000,
        timeout=args.timeout_ms / 1000,
    )
    if args.endpoint.startswith("tcp://") and args.key is None:
        print(
            "tlt coordinator: without --key, whoever reaches this port may take part.",
            file=sys.stderr,
        )
    stop = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: stop.set())
    server = Server(args.endpoint, rules, args.key)
    print(f"tlt coordinator: at {server.endpoint}", flush=True)
    server.run(stop)


def _status(endpoint: str, key: Path | None) -> None:
    status = ask(endpoint, key)
    if status is None:
        raise ConfigError(f"No coordinator answers at {endpoint}; start one: tlt coordinator.")
    for device, state in sorted(status.states.items()):
        print(f"{device:24} {state}")
    for name, role in sorted(status.members.items()):
        print(f"{name:24} {role}")
    print(
        f"tokens/s {status.tokens_per_s:.1f}, late stops {status.late}, malformed messages "
        f"{status.dropped}"
    )
    if status.stop_ms:
        ranked = sorted(status.stop_ms)
        last = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
        print(f"stops: p50 {ranked[len(ranked) // 2]:.1f} ms, p99 {last:.1f} ms of {len(ranked)}")
