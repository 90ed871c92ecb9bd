"""The command line of `tlt coordinator`."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line, flags
from tlt_sglang.config.settings import SETTINGS, Config, settings_for
from tlt_sglang.coordinator.endpoints import default_endpoint, make_keys
from tlt_sglang.coordinator.server import Server
from tlt_sglang.coordinator.status import print_status
from tlt_sglang.coordinator.world import Rules


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return command_line.run("coordinator", _coordinator, argv)


def rules(config: Config) -> Rules:
    """Return the coordinator's rules, with times in seconds."""
    return Rules(
        threshold=config.coordinator_threshold,
        dwell=config.coordinator_dwell_ms / 1000,
        preempt=config.preempt_ms / 1000,
        timeout=config.coordinator_timeout_ms / 1000,
    )


def _coordinator(argv: Sequence[str]) -> None:
    parser = _parser()
    if command_line.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    if args.make_keys is not None:
        public, secret = make_keys(args.make_keys)
        print(f"{secret} for the coordinator, {public} for its members; keep both private.")
        return
    config = flags.with_flags(flags.base_config(args) or Config(), flags.flag_values(args))
    endpoint = config.coordinator or default_endpoint()
    key = None if config.coordinator_key is None else Path(config.coordinator_key)
    if args.status:
        print_status(endpoint, key)
    else:
        _serve(endpoint, rules(config), key)


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        "tlt coordinator",
        "Share devices between inference and training: tell each trainer when it may use its "
        "device, and when it must leave.",
    )
    flags.add_flag(parser, SETTINGS["coordinator"], default=default_endpoint())
    flags.add_flags(parser, [s for s in settings_for("coordinator") if s.name != "coordinator"])
    flags.add_config_flag(parser)
    parser.add_argument(
        "--make-keys", type=Path, metavar="DIR", help="Write new CURVE keys to DIR, and exit"
    )
    parser.add_argument(
        "--status", action="store_true", help="Print the coordinator's devices, and exit"
    )
    return parser


def _serve(endpoint: str, rules: Rules, key: Path | None) -> None:
    if endpoint.startswith("tcp://") and key is None:
        print(
            "tlt coordinator: without --tlt-coordinator-key, anyone who reaches this port can take "
            "part.",
            file=sys.stderr,
        )
    # Each member on another machine is an open file.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = Server(endpoint, rules, key)
    print(f"tlt coordinator: at {server.endpoint}", flush=True)
    server.run(stop)
