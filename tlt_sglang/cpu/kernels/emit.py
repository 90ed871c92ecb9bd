"""Building blocks of generated kernels: vectors of floats as LLVM IR.

LLVM vectorises plain loops by itself, but not with the widest registers, and it accesses memory for
each of several sums that are accumulated together. `matrix` and `sums` state instead which values
stay in registers.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from llvmlite.ir import Value
from numba import types
from numba.core import cgutils
from numba.core.base import BaseContext
from numba.extending import intrinsic

WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
"""True for CPUs with 32 registers of 16 floats; others have 16 registers of 8."""
CACHE_LINE = 64
"""Bytes that are read from memory at once."""

I64, I32, F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()


def function(generate: Callable[..., None]) -> Any:
    """Return a function for kernels that takes a tuple of int64.

    `generate(builder, *values)` emits its body.
    """

    @intrinsic
    def emitted(typing: object, arguments: object) -> Any:
        def emit(
            context: BaseContext, builder: ir.IRBuilder, signature: object, values: Any
        ) -> Any:
            generate(builder, *cgutils.unpack_tuple(builder, values[0]))
            return context.get_dummy_value()

        return types.void(arguments), emit

    return emitted


def floats(lanes: int) -> ir.VectorType:
    """Return the type of a vector of `lanes` floats."""
    return ir.VectorType(F32, lanes)


def at(b: ir.IRBuilder, address: Value, index: Value | int, size: int, kind: ir.Type) -> Value:
    """Return a pointer to element `index` (an int or an int64 value) of `size` bytes each."""
    offset = index if isinstance(index, Value) else I64(index)
    return b.inttoptr(step(b, address, offset, size), kind.as_pointer())


def step(b: ir.IRBuilder, address: Value, index: Value, size: int) -> Value:
    """Return the address `index * size` bytes further."""
    return b.add(address, b.mul(index, I64(size)))


def broadcast(b: ir.IRBuilder, number: Value, lanes: int) -> Value:
    """Return a vector of `lanes` copies of a float."""
    undefined = ir.Constant(floats(lanes), ir.Undefined)
    first = b.insert_element(undefined, number, I32(0))
    indices = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return b.shuffle_vector(first, undefined, indices)


def multiply_add(b: ir.IRBuilder, x: Value, y: Value, z: Value) -> Value:
    """Return x * y + z of vectors, rounded once."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    name = f"llvm.fma.v{x.type.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [x, y, z])


def total(b: ir.IRBuilder, x: Value) -> Value:
    """Return the sum of a vector's floats, added by halves."""
    kind = ir.FunctionType(F32, [F32, x.type])
    name = f"llvm.vector.reduce.fadd.v{x.type.count}f32"
    reduce = cgutils.get_or_insert_function(b.module, kind, name)
    return b.call(reduce, [F32(0.0), x], fastmath=("reassoc",))


def prefetch(b: ir.IRBuilder, address: Value, size: int, writing: bool = False) -> None:
    """Prefetch `size` bytes that will be read, or written."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    request = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    access, locality, data = I32(int(writing)), I32(3), I32(1)
    for line in range(0, size, CACHE_LINE):
        pointer = b.inttoptr(b.add(address, I64(line)), byte)
        b.call(request, [pointer, access, locality, data])


def in_tiles(b: ir.IRBuilder, rows: Value, tile: int, body: Callable[[int, Value], None]) -> None:
    """Emit a loop over tiles of rows, as few as possible and of nearly the same size.

    `body(count, first)` emits the code for the `count` rows from `first` on, at most `tile`.
    """
    # The smallest number of tiles, and the size that divides the rows evenly over them.
    begin, next_, done = (b.append_basic_block(name) for name in ("begin", "tile", "done"))
    b.cbranch(b.icmp_signed(">", rows, I64(0)), begin, done)
    b.position_at_end(begin)
    tiles = b.sdiv(b.add(rows, I64(tile - 1)), I64(tile))
    even = b.sdiv(b.add(rows, b.sub(tiles, I64(1))), tiles)
    b.branch(next_)

    # One block of code for each size, because `count` is a constant in it.
    b.position_at_end(next_)
    first = b.phi(I64)
    first.add_incoming(I64(0), begin)
    sizes = [b.append_basic_block(f"rows{count}") for count in range(1, tile + 1)]
    remaining = b.sub(rows, first)
    size = b.select(b.icmp_signed("<", remaining, even), remaining, even)
    choice = b.switch(size, sizes[-1])
    for count, block in enumerate(sizes, start=1):
        if count < tile:
            choice.add_case(I64(count), block)
        b.position_at_end(block)
        body(count, first)
        following = b.add(first, I64(count))
        first.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, rows), next_, done)
    b.position_at_end(done)
