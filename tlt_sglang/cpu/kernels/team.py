"""Torch's own OpenMP threads, lent to a kernel.

A thread pool of our own would fight torch's for the cores: between two matrix products torch's
workers spin, waiting for the next. So a kernel that wants every core is run as one more parallel
region of the same team, through libgomp's entry point for one (`GOMP_parallel`, the call that
compilers emit for `#pragma omp parallel`). Where torch runs on another OpenMP library the kernel
runs on one thread.

A task is a C function `void task(void *data)`; every thread of the team calls it with the same
data, and they share the work by counting up an integer in it (`next_item`).
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
def start(together: bool) -> Start:
    """(address of the task, address of its data) -> runs it and waits; alone, or on the team."""
    pointer = ctypes.c_void_p
    lone = ctypes.CFUNCTYPE(None, pointer)
    alone = functools.cache(lone)
    try:
        library = ctypes.CDLL(_libgomp(), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        together = False
    if not together:
        return lambda task, data: alone(task)(data)
    parallel.argtypes = [pointer, pointer, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    threads = torch.get_num_threads()
    return lambda task, data: parallel(task, data, threads, 0)


def _libgomp() -> str:
    """The file of the libgomp that torch has loaded: some wheels bring one with a name of its own.

    Raises OSError where that cannot be told.
    """
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"(/\S*/libgomp[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)
    return found.group(1) if found else "libgomp.so.1"


@intrinsic
def pointer_to(typingctx: Any, address: Any) -> Any:
    """An integer address as a pointer that `carray` takes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def next_item(typingctx: Any, address: Any) -> Any:
    """Count the int64 at `address` up by one, atomically; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), generate
