"""What generated kernels are made of: vectors of floats, in LLVM's own terms.

LLVM makes vectors of plain loops by itself, but not of the widest kind, and it goes to memory for
every sum where several are added up beside each other. `matrix` and `sums` say instead what stays
in registers.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
"""Whether there are 32 registers of 16 floats, not 16 of 8."""
CACHE_LINE = 64
"""Bytes that come from memory together."""

I64, I32, F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()


def function(generate: Callable[..., None]) -> Any:
    """A function for kernels, of a tuple of int64: `generate(builder, *values)` emits it."""

    @intrinsic
    def emitted(typing: Any, arguments: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            generate(builder, *cgutils.unpack_tuple(builder, values[0]))
            return context.get_dummy_value()

        return types.void(arguments), emit

    return emitted


def floats(lanes: int) -> ir.VectorType:
    return ir.VectorType(F32, lanes)


def at(b: ir.IRBuilder, address: Any, index: Any, size: int, kind: Any) -> Any:
    """A pointer to element `index`, a number or an int64 value, of a list of `size` bytes each."""
    place = index if isinstance(index, ir.Value) else I64(index)
    return b.inttoptr(step(b, address, place, size), kind.as_pointer())


def step(b: ir.IRBuilder, address: Any, index: Any, size: int) -> Any:
    """The address `index` times `size` bytes on."""
    return b.add(address, b.mul(index, I64(size)))


def everywhere(b: ir.IRBuilder, number: Any, lanes: int) -> Any:
    """A vector of `lanes` times the same float."""
    nothing = ir.Constant(floats(lanes), ir.Undefined)
    one = b.insert_element(nothing, number, I32(0))
    places = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return b.shuffle_vector(one, nothing, places)


def multiply_add(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of vectors, rounded once."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    name = f"llvm.fma.v{x.type.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [x, y, z])


def total(b: ir.IRBuilder, x: Any) -> Any:
    """The sum of a vector's floats, by halves."""
    kind = ir.FunctionType(F32, [F32, x.type])
    name = f"llvm.vector.reduce.fadd.v{x.type.count}f32"
    reduce = cgutils.get_or_insert_function(b.module, kind, name)
    return b.call(reduce, [F32(0.0), x], fastmath=("reassoc",))


def prefetch(b: ir.IRBuilder, address: Any, size: int, writing: bool = False) -> None:
    """Ask the memory for `size` bytes that will be read, or written."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    request = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    use, kept, data = I32(int(writing)), I32(3), I32(1)
    for line in range(0, size, CACHE_LINE):
        place = b.inttoptr(b.add(address, I64(line)), byte)
        b.call(request, [place, use, kept, data])


def in_tiles(b: ir.IRBuilder, rows: Any, tile: int, body: Callable[[int, Any], None]) -> None:
    """`body(count, first)` emits what is done to `count` rows from `first` on: in as few tiles of
    at most `tile` rows as there can be, of nearly the same size."""
    begin, next_, done = (b.append_basic_block(name) for name in ("begin", "tile", "done"))
    b.cbranch(b.icmp_signed(">", rows, I64(0)), begin, done)
    b.position_at_end(begin)
    tiles = b.sdiv(b.add(rows, I64(tile - 1)), I64(tile))
    even = b.sdiv(b.add(rows, b.sub(tiles, I64(1))), tiles)
    b.branch(next_)
    b.position_at_end(next_)
    first = b.phi(I64)
    first.add_incoming(I64(0), begin)
    sizes = [b.append_basic_block(f"rows{count}") for count in range(1, tile + 1)]
    left = b.sub(rows, first)
    choice = b.switch(b.select(b.icmp_signed("<", left, even), left, even), sizes[-1])
    for count, block in enumerate(sizes, start=1):
        if count < tile:
            choice.add_case(I64(count), block)
        b.position_at_end(block)
        body(count, first)
        following = b.add(first, I64(count))
        first.add_incoming(following, b.block)
        b.cbranch(b.icmp_signed("<", following, rows), next_, done)
    b.position_at_end(done)
