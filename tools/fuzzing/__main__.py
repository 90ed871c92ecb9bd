"""Start a server, send it random requests, and report what it answered: `make fuzz`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tlt_sglang.launcher.server_process import ServerProcess
from tools.fuzzing.run import BLOCK, Fuzzing

SERVER = (
    *("--model", "smollm2-135m", "--adaptive-spec", "--tlt-policy", "random"),
    *("--tlt-strategies", "off,eagle3:3x1x4,eagle3:1x1x2,eagle3:3x4x8,ngram:4"),
    *("--context-length", "512", "--max-total-tokens", "12288", "--skip-server-warmup"),
    *("--enable-custom-logit-processor", "--enable-return-hidden-states"),
)
"""A pool whose strategy is drawn for every step; the last of a flag wins."""


def main() -> int:
    """Return 1 if a request was answered wrongly."""
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=...", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, help="default: an hour")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first block of requests")
    parser.add_argument("--out", type=Path, help="write counts and findings to this JSON file")
    parser.add_argument("--log", type=Path, help="keep the server's log in this file")
    parser.add_argument("server", nargs="*", help="further flags of the server, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = options.log or Path(folder) / "server.log"
        with ServerProcess([*SERVER, *options.server], log) as server:
            server.wait_ready()
            fuzzing = Fuzzing(server)
            try:
                fuzzing.run(options.seed, options.seconds, report=print)
            except KeyboardInterrupt:
                print("Interrupted.")
    print(fuzzing.table())
    for finding in fuzzing.findings:
        print(json.dumps(finding.__dict__)[:2000])
    if options.out is not None:
        options.out.write_text(json.dumps(fuzzing.result(), indent=1) + "\n")
    print(
        f"{fuzzing.answers.total()} requests in blocks of {BLOCK}: {len(fuzzing.findings)} findings"
    )
    return 1 if fuzzing.findings else 0


if __name__ == "__main__":
    sys.exit(main())
