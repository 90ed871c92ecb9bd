"""Imported by the fork server alone and last of all, for its effects.

What has been imported stays, and stays shared: no collection looks at it again, neither here nor in
the processes that are forked.
"""

from __future__ import annotations

import gc
import threading

from tqdm import tqdm

gc.freeze()
gc.enable()
# tqdm's lock between processes is a semaphore, which a process that is killed leaves behind.
tqdm.set_lock(threading.RLock())
