"""The last import of the fork server, made for its effects; nothing else imports it.

It freezes all imported objects, so that their memory stays shared: no garbage collection visits
them again, neither in the fork server nor in the processes that are forked from it.
"""

from __future__ import annotations

import gc
import threading

from tqdm import tqdm

gc.freeze()
gc.enable()
# tqdm's lock between processes is a semaphore, which would outlive a process that is killed.
tqdm.set_lock(threading.RLock())
