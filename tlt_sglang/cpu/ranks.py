"""Tensor parallelism on CPU: each rank has its own cores, and ranks communicate by gloo.

SGLang's shared-memory collectives are in its compiled library; without it those of
torch.distributed are used. This is slower than one process on one machine; it exists so that code
for several ranks can be run and tested anywhere. Runs in the main and scheduler processes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import ServerArgs

BIND = "SGLANG_CPU_OMP_THREADS_BIND"
"""SGLang's environment variable for the cores of each rank."""


def cores() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def share_cores(tp_size: int) -> None:
    """Divide the cores among the ranks, unless the user has; call this in the main process."""
    if tp_size > 1:
        available = cores()
        each = len(available) // tp_size
        shares = [available[rank * each : (rank + 1) * each] for rank in range(tp_size)]
        os.environ.setdefault(BIND, "|".join(",".join(map(str, share)) for share in shares))


def begin(args: ServerArgs) -> None:
    """Limit a scheduler process to as many threads as its rank has cores."""
    if args.tp_size > 1:
        import torch
        import torch._dynamo.config

        torch.set_num_threads(max(1, len(cores()) // args.tp_size))
        # Otherwise the first request compiles sharded embeddings for most of a minute.
        torch._dynamo.config.disable = True
