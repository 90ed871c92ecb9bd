"""Tensor parallelism on CPU: each rank has cores of its own, and they talk by gloo.

SGLang's shared-memory collectives are in its compiled library; without it torch.distributed's are
used. Slower than one process on one machine: it is there so that code for several ranks can be run
and tested anywhere.
"""

from __future__ import annotations

import os
from typing import Any

BIND = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's variable: the cores of each rank."""


def cores() -> list[int]:
    """Cores this process may use."""
    return sorted(os.sched_getaffinity(0))


def share_cores(tp_size: int) -> None:
    """In the main process: divide the cores among the ranks, unless the user has."""
    if tp_size > 1:
        mine = cores()
        each = len(mine) // tp_size
        shares = [mine[rank * each : (rank + 1) * each] for rank in range(tp_size)]
        os.environ.setdefault(BIND, "|".join(",".join(map(str, share)) for share in shares))


def begin(args: Any) -> None:
    """In a scheduler process, before anything runs: no more threads than the rank has cores."""
    if args.tp_size > 1:
        import torch
        import torch._dynamo.config

        torch.set_num_threads(max(1, len(cores()) // args.tp_size))
        # Sharded embeddings are compiled at the first request, for most of a minute.
        torch._dynamo.config.disable = True
