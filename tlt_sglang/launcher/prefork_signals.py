"""The first import of the fork server, made for its effects; nothing else imports it.

It forwards SIGQUIT to the main process: SGLang's engine processes report a crash by SIGQUIT to
their parent, which is the fork server instead of the main process when they are forked. It has the
fork server killed when the main process is, however that ends: the engine's processes end with
their parent, and the fork server itself would stay as long as any of them. And it turns garbage
collection off during the other imports, see `prefork_ready`.
"""

from __future__ import annotations

import gc
import os
import signal
from types import FrameType

from tlt_sglang.launcher.parent_death import end_with_parent

_main = os.getppid()


def _forward(number: int, frame: FrameType | None) -> None:
    if os.getppid() == _main:
        os.kill(_main, number)


signal.signal(signal.SIGQUIT, _forward)
end_with_parent(signal.SIGKILL)
gc.disable()
