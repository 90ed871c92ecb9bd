"""Engine processes that are forked from a server which has already imported SGLang (CPU only).

SGLang starts its scheduler and detokenizer by `spawn`: each imports torch, transformers and SGLang
again, and only after the main process has done the same. A fork server (Python's own, of
`multiprocessing`) imports them once, beside the main process, and the engine's processes are forked
from it in milliseconds. This is for CPU only: a process that has used CUDA must not be forked.

`begin` runs in the launcher before anything else, `use` in the main process, and `ForkedFunction`
in the forked one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from types import FrameType
from typing import Any

from tlt_sglang.config.settings import VARIABLE
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
    """Start the fork server and its imports; return at once. Call this before threads exist.

    The fork server itself runs without TLT: each process that is forked from it loads TLT with the
    configuration of its own environment.
    """
    global _begun
    config = os.environ.pop(VARIABLE, None)
    try:
        forkserver.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()
    finally:
        if config is not None:
            os.environ[VARIABLE] = config
    _begun = True


def use() -> None:
    """Make SGLang start its processes from the fork server, if `begin` was called.

    SGLang has set the start method to spawn by now, with which every process imports everything
    again.

    Children report a crash by SIGQUIT, for which SGLang's own handler kills this process silently
    while SGLang starts. The handler set here raises an error instead.
    """
    if _begun:
        multiprocessing.set_start_method("forkserver", force=True)
        signal.signal(signal.SIGQUIT, _report_crash)


def _report_crash(number: int, frame: FrameType | None) -> None:
    raise EnvironmentProblem(
        "SGLang did not start because an engine process failed; see its message above."
    )


class ForkedFunction:
    """The main function of a forked process, which runs with the present environment of its parent.

    Without it, a forked process has the older environment and the signal handlers of the fork
    server, which forwards SIGQUIT.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.environ: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self.function, "environ": dict(os.environ)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import setproctitle

        # SGLang finds its schedulers by their titles, which cannot be set any more once the
        # environment has moved, unless this has been called before.
        setproctitle.getproctitle()
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(self.environ)
        return self.function(*args, **kwargs)
