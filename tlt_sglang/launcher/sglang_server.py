"""SGLang's own launch, in the launcher's process, and the end of every process that it started."""

from __future__ import annotations

import gc
import os
from typing import Any

from tlt_sglang.config import sglang_flags
from tlt_sglang.errors import EXIT_REPORTED, EnvironmentProblem, TltError
from tlt_sglang.launcher import leftovers, prefork, supervise

OTHER_SERVERS = ("encoder_only", "smg_grpc_mode", "grpc_mode", "use_ray")
"""Flags of servers that are not the HTTP server; the fork server serves that one."""


def run(argv: list[str], forked: bool) -> int:
    """Run SGLang's server until it is stopped; return the exit status.

    With `forked`, its processes come from the fork server. Raises EnvironmentProblem if it does
    not start.
    """
    # What imports create stays; collecting garbage in it again and again is a tenth of a start.
    gc.disable()
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints import http_server  # noqa: F401 (run_server would, later)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    gc.enable()
    try:
        load_plugins()
        sglang_flags.check(argv)
        args = prepare_server_args(argv)
        if forked and not any(getattr(args, name, False) for name in OTHER_SERVERS):
            _launch_forked(args)
        else:
            run_server(args)
    except (TltError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        if error.code == EXIT_REPORTED:
            return 1
        raise
    except Exception as error:
        if f"exit code: {EXIT_REPORTED}" in str(error):
            return 1
        if os.environ.get("TLT_DEBUG") == "1":
            raise
        raise EnvironmentProblem(_first_sentence(error)) from error
    finally:
        supervise.stop()
        kill_process_tree(os.getpid(), include_parent=False)
        leftovers.remove()
        # A ZeroMQ context that is collected at exit would wait for peers that have ended.
        gc.disable()
    return 0


def _launch_forked(args: Any) -> None:
    """Run SGLang's HTTP server, with its processes from the fork server."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    http_server.launch_server(
        args,
        run_scheduler_process_func=prefork.ForkedFunction(http_server.run_scheduler_process),
        run_detokenizer_process_func=prefork.ForkedFunction(run_detokenizer_process),
    )


def _first_sentence(error: Exception) -> str:
    """Return one sentence for an error of SGLang's; `TLT_DEBUG=1` shows its traceback."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = " ".join(" ".join(lines).split()) if lines[0].rstrip().endswith(":") else lines[0]
    if "scheduler died" in text:
        text = "the engine process stopped while starting; its message stands above"
    return f"SGLang did not start: {text.rstrip('.')} (TLT_DEBUG=1 shows the traceback)."
