"""Engine processes forked from a server that has imported SGLang already (CPU only).

SGLang starts its scheduler and detokenizer by `spawn`: each imports torch, transformers and SGLang
anew, and only after the main process has done the same. A fork server (Python's own, of
`multiprocessing`) imports them once, beside the main process, and the engine's processes are forked
from it in milliseconds. Only on CPU: a process that has touched CUDA must not be forked.

`begin` runs in our launcher before anything else, the functions below it in the main process, and
`Target` in the forked one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from types import FrameType
from typing import Any

from tlt_sglang.errors import EnvironmentProblem

_PRELOAD = [
    "tlt_sglang.launcher.prefork_signals",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "tlt_sglang.cpu.decoder",
    "tlt_sglang.cpu.sampling",
    "tlt_sglang.launcher.prefork_ready",
]

_begun = False


def begin() -> None:
    """Start the fork server and let it import; returns at once. Call before threads exist."""
    global _begun
    forkserver.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    _begun = True


def use() -> None:
    """Have SGLang start its processes from the fork server, if `begin` was called.

    And have this process, whose children tell it of a crash by SIGQUIT, say so while SGLang starts;
    SGLang's own handler kills it without a word.
    """
    if _begun:
        multiprocessing.set_start_method("forkserver", force=True)
        signal.signal(signal.SIGQUIT, _report_crash)


def _report_crash(number: int, frame: FrameType | None) -> None:
    raise EnvironmentProblem(
        "SGLang did not start: an engine process failed, its message stands above."
    )


class Target:
    """A process's main function, run with the environment the parent has when it starts it.

    A forked process inherits the environment and the signal handlers of the fork server instead,
    which is older and forwards SIGQUIT.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.environ: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "environ": dict(os.environ)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self.environ)
        return self.function(*args, **kwargs)
