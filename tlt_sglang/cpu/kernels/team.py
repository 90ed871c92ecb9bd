"""Kernels on torch's own OpenMP threads.

A separate thread pool would compete with torch's for the cores: between two matrix products torch's
workers spin, waiting for the next. So a kernel for every core runs as one more parallel region of
the same team, through libgomp's entry point (`GOMP_parallel`, the call that compilers emit for
`#pragma omp parallel`). Where torch uses another OpenMP library the kernel runs on one thread.

A task is a C function `void task(void *data)`; every thread of the team calls it with the same
data, and they share the work by incrementing an integer in it (`next_item`).

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Start = Callable[[int, int], None]


@functools.cache
def start(parallel: bool) -> Start:
    """Return a function of the addresses of a task and of its data that runs the task and waits.

    It runs on the whole team if `parallel`, and otherwise on the calling thread.
    """
    pointer = ctypes.c_void_p
    call = functools.cache(ctypes.CFUNCTYPE(None, pointer))
    try:
        library = ctypes.CDLL(_libgomp(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        run_parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        parallel = False
    if not parallel:
        return lambda task, data: call(task)(data)
    run_parallel.argtypes = [pointer, pointer, ctypes.c_uint, ctypes.c_uint]
    run_parallel.restype = None
    threads = torch.get_num_threads()
    return lambda task, data: run_parallel(task, data, threads, 0)


def _libgomp() -> str:
    """Return the file of the libgomp that torch has loaded; some wheels bring their own.

    Raises OSError where the process's memory map cannot be read.
    """
    maps = Path("/proc/self/maps").read_text()
    match = re.search(r"(/\S*/libgomp[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)
    return match.group(1) if match else "libgomp.so.1"


@intrinsic
def pointer_to(typingctx: object, address: object) -> Any:
    """Convert an integer address to a pointer that `carray` accepts."""

    def generate(context: object, builder: ir.IRBuilder, signature: object, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def next_item(typingctx: object, address: object) -> Any:
    """Increment the int64 at `address` atomically and return its former value."""

    def generate(context: object, builder: ir.IRBuilder, signature: object, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate
