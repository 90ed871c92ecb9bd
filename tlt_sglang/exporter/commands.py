"""The command line of `tlt export`."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line, flags
from tlt_sglang.config.settings import SETTINGS, Config
from tlt_sglang.errors import FlagError
from tlt_sglang.exporter.service import Exporter


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 stopped, 1 a problem, 2 bad usage."""
    return command_line.run("export", _export, argv)


def _export(argv: Sequence[str]) -> None:
    parser = command_line.Parser(
        "tlt export",
        "Serve the harvest logs of this machine's engines to sidecars on other machines, which "
        "share the store.",
    )
    flags.add_flags(parser, [SETTINGS["store"], SETTINGS["coordinator_key"]])
    flags.add_config_flag(parser)
    parser.add_argument(
        "--address",
        required=True,
        metavar="ADDRESS",
        help="Where to listen, as the sidecars reach it: tcp://HOST:PORT, or ipc:///FOLDER/NAME",
    )
    if command_line.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    config = flags.with_flags(flags.base_config(args) or Config(), flags.flag_values(args))
    if config.store_path is None:
        raise FlagError("The exporter needs the store of its engines; give --tlt-store DIR.")
    key = None if config.coordinator_key is None else Path(config.coordinator_key)
    if args.address.startswith("tcp://") and key is None:
        print(
            "tlt export: without --tlt-coordinator-key, anyone who reaches this port can read the "
            "hidden states.",
            file=sys.stderr,
        )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    exporter = Exporter(config.store_path, args.address, key)
    print(f"tlt export: at {exporter.address}", flush=True)
    exporter.run(stop)
