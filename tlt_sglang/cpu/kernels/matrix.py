"""Products of a few rows with a large weight: as fast as the weight can be read.

A decode step multiplies one row a request, a verify step a few more, and both read every weight
once. Libraries are made for many rows, and on few of them lose up to half of the memory's speed.
Here a weight lies in blocks of `BLOCK` outputs, so that a thread reads a block from its beginning
to its end, while the sums of up to `TILE` rows stay in registers. More rows are more passes over a
block, which is in the cache by then; so all of them together ask the memory for the next block, and
it is read at its own pace while the sums are made.

Each sum runs over K in order, whatever the number of rows: a row's result does not depend on the
rows beside it, and is that of a float32 product wherever it is computed.

A weight may lie in eight bits, with a scale for each output: a quarter of the memory to read. It is
multiplied as the float32 numbers that those are.

Shapes: T rows, K inputs, N outputs.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.argmax import first_of_largest, largest_order
from tlt_sglang.cpu.kernels.compile import Array, inline, kernel
from tlt_sglang.cpu.kernels.emit import F32, I32, I64
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start
from tlt_sglang.cpu.kernels.vector import silu_row

BLOCK = 32 if emit.WIDE else 16
"""Outputs that are summed together: two registers."""
TILE = 12 if emit.WIDE else 6
"""Rows that are summed together: two registers each, of 32 or 16."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] in blocks."""

    blocks: torch.Tensor  # [ceil(N / BLOCK), K, BLOCK] float32 or int8
    scales: torch.Tensor  # [outputs in all blocks] float32; [0] where there are none
    outputs: int
    padded: int  # outputs in all blocks
    data: Array  # what the task reads; `multiply` fills in what belongs to a call
    address: int  # of the data

    @property
    def halves(self) -> bool:
        """Whether it is two weights of whole blocks, which `multiply_gated` takes."""
        return self.outputs % (2 * BLOCK) == 0


def pack(weight: torch.Tensor, narrow: bool = False) -> Packed:
    """A copy of `weight` [N, K] float32 in blocks; `narrow`: in eight bits."""
    outputs, inputs = weight.shape
    scales = weight.new_empty(0)
    if narrow:
        scales = weight.abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
        weight = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
    whole, rest = divmod(outputs, BLOCK)
    count = whole + (rest > 0)
    blocks = weight.new_zeros(count, inputs, BLOCK)
    blocks[:whole] = weight[: whole * BLOCK].view(whole, BLOCK, inputs).transpose(1, 2)
    if rest:
        blocks[whole, :, :rest] = weight[whole * BLOCK :].T
    scales = torch.nn.functional.pad(scales, (0, count * BLOCK - outputs)) if narrow else scales
    data = np.zeros(10, np.int64)
    data[1:5] = blocks.data_ptr(), count, inputs, narrow
    data[8] = scales.data_ptr()
    return Packed(blocks, scales, outputs, count * BLOCK, data, data.ctypes.data)


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [T, K] float32, contiguous -> x times the weight transposed [T, N].

    One call at a time: a weight's calls share the memory that tells its task what to do.
    """
    out = _multiply(x, packed)
    return out if packed.outputs == packed.padded else out[:, : packed.outputs].contiguous()


def multiply_largest(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `multiply`, and the place of the first of the largest of each row [T], as torch.argmax has
    it; None for a weight that does not fill its blocks.

    Every block's largest number is found by the thread that has just computed the block: afterwards
    a row of logits lies in the caches of all cores.
    """
    if packed.outputs != packed.padded:
        return multiply(x, packed), None
    rows = x.shape[0]
    found = np.empty((packed.padded // BLOCK, rows), np.int32)
    places = torch.empty(rows, dtype=torch.int64)
    out = _multiply(x, packed, found.ctypes.data)
    _places_of_largest(found.reshape(-1), out.numpy().view(np.int32).reshape(-1), places.numpy())
    return out, places


def _multiply(x: torch.Tensor, packed: Packed, found: int = 0) -> torch.Tensor:
    """All outputs of all blocks; each block's largest goes to the address `found`, if any."""
    rows, data = x.shape[0], packed.data
    out = torch.empty((rows, packed.padded), dtype=torch.float32)
    data[0], data[5], data[6], data[7], data[9] = 0, rows, x.data_ptr(), out.data_ptr(), found
    start(True)(_task.address, packed.address)
    return out


def multiply_gated(x: torch.Tensor, out: torch.Tensor, packed: Packed) -> None:
    """An MLP's first half: out [T, N / 2] = silu(gate) * up, of which the gate is the first half of
    x times the weight, and up the second. x [T, K]; all float32 and contiguous.

    The same thread computes both and joins them while they are at hand. Of a weight with `halves`.
    """
    data = packed.data
    data[0], data[5], data[6], data[7] = 0, x.shape[0], x.data_ptr(), out.data_ptr()
    start(True)(_gated_task.address, packed.address)


def _products(narrow: bool) -> Any:
    """A function for kernels: all rows times one block. Its arguments: the addresses of x, the
    block, its scales, the sums and the block that comes next; K; the floats from a row of sums to
    the next; T."""

    def generate(
        b: ir.IRBuilder,
        x: Any,
        block: Any,
        scales: Any,
        sums: Any,
        next_block: Any,
        inputs: Any,
        stride: Any,
        rows: Any,
    ) -> None:
        size = BLOCK * (1 if narrow else 4)
        # In one pass all of the next block is asked for, in more passes half in the first, and
        # the other half in those after it.
        pace = b.select(b.icmp_signed("<=", rows, I64(TILE)), I64(size), I64(size // 2))
        half = b.add(next_block, b.mul(inputs, pace))

        def some(count: int, first: Any) -> None:
            given, wanted = (
                emit.step(b, at, b.mul(first, size), 4)
                for at, size in ((x, inputs), (sums, stride))
            )
            ahead = b.select(b.icmp_signed("==", first, I64(0)), next_block, half)
            scale = scales if narrow else None
            _generate_sums(b, count, given, block, scale, wanted, ahead, pace, inputs, stride)

        emit.in_tiles(b, rows, TILE, some)

    return emit.function(generate)


def _generate_sums(
    b: ir.IRBuilder,
    rows: int,
    x: Any,
    block: Any,
    scales: Any,
    sums: Any,
    ahead: Any,
    pace: Any,
    inputs: Any,
    stride: Any,
) -> None:
    """So many rows, one input after the other; without `scales` the block is of floats. For each
    input the memory is asked for what lies at `ahead`, `pace` bytes further every time."""
    vector, size = emit.floats(BLOCK), 4 if scales is None else 1
    stored = vector if scales is None else ir.VectorType(ir.IntType(8), BLOCK)
    before, loop, after = b.block, b.append_basic_block("input"), b.append_basic_block("summed")
    b.branch(loop)

    b.position_at_end(loop)
    k = b.phi(I64)
    totals = [b.phi(vector) for _ in range(rows)]
    place = emit.step(b, block, k, BLOCK * size)
    weights = b.load(b.inttoptr(place, stored.as_pointer()), align=size)
    emit.prefetch(b, b.add(ahead, b.mul(k, pace)), BLOCK * size)
    if scales is not None:
        weights = b.sitofp(b.sext(weights, ir.VectorType(I32, BLOCK)), vector)
    results = []
    for row, total in enumerate(totals):
        number = b.load(emit.at(b, x, b.add(k, b.mul(inputs, I64(row))), 4, F32), align=4)
        spread = emit.everywhere(b, number, BLOCK)
        results.append(emit.multiply_add(b, spread, weights, total))
        total.add_incoming(ir.Constant(vector, [0.0] * BLOCK), before)
        total.add_incoming(results[-1], loop)
    following = b.add(k, I64(1))
    k.add_incoming(I64(0), before)
    k.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, inputs), loop, after)

    b.position_at_end(after)
    if scales is not None:
        factors = b.load(b.inttoptr(scales, vector.as_pointer()), align=4)
        results = [b.fmul(result, factors) for result in results]
    for row, result in enumerate(results):
        b.store(result, emit.at(b, sums, b.mul(stride, I64(row)), 4, vector), align=4)


_plain_products, _narrow_products = _products(narrow=False), _products(narrow=True)


@inline()
def _block(data: Array, place: int, following: int, sums: int, stride: int) -> None:
    """All rows times the block at `place`: to the address `sums`, `stride` floats from a row to the
    next. The block at `following` comes next; none if that is not below their number."""
    blocks, inputs, narrow, rows, x, scales = data[1], data[3], data[4], data[5], data[6], data[8]
    size = inputs * BLOCK * (1 if narrow else 4)
    block, next_block = blocks + place * size, blocks + min(following, data[2] - 1) * size
    scale = scales + place * BLOCK * 4
    if narrow:
        _narrow_products((x, block, scale, sums, next_block, inputs, stride, rows))
    else:
        _plain_products((x, block, scale, sums, next_block, inputs, stride, rows))


def _work(pointer: Any) -> None:
    """What each thread of the team does: one block after the other."""
    data = carray(pointer, (10,), np.int64)
    count, rows, out, found = data[2], data[5], data[7], data[9]
    item = next_item(data.ctypes.data)
    while item < count:
        following = next_item(data.ctypes.data)
        sums, stride = out + item * BLOCK * 4, count * BLOCK
        _block(data, item, following, sums, stride)
        if found != 0:
            of_block = carray(pointer_to(found + item * rows * 4), (rows,), np.int32)
            for row in range(rows):
                place = pointer_to(sums + row * stride * 4)
                of_block[row] = largest_order(carray(place, (BLOCK,), np.int32))
        item = following


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)


def _gated_work(pointer: Any) -> None:
    """The same for `multiply_gated`: a block of the gate, and the one of up that belongs to it."""
    data = carray(pointer, (10,), np.int64)
    half, rows = data[2] // 2, data[5]
    # Of an even number of rows: what is joined are whole vectors, in one loop without a rest, which
    # LLVM may compute otherwise.
    flat = (rows + 1) // 2 * 2 * BLOCK
    sums, joined = np.zeros((2, flat), np.float32), np.empty(flat, np.float32)
    ints = np.empty(flat, np.int32)
    active = carray(pointer_to(data[7]), (rows, half, BLOCK), np.float32)
    item = next_item(data.ctypes.data)
    while item < half:
        following = next_item(data.ctypes.data)
        for side in range(2):
            place = item + side * half
            then = following if side else item + half
            _block(data, place, then, sums.ctypes.data + side * flat * 4, BLOCK)
        silu_row(sums[0], sums[1], joined, ints)
        for row in range(rows):
            for i in range(BLOCK):
                active[row, item, i] = joined[row * BLOCK + i]
        item = following


_gated_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_gated_work)


@kernel("void(int32[::1], int32[::1], int64[::1])")
def _places_of_largest(found: Array, bits: Array, places: Array) -> None:
    """Of each row: where the first of its largest stands, by what was `found` [blocks, T] as the
    largest of each block, in the bits [T, outputs] of the numbers."""
    rows = places.size
    if rows == 0:
        return
    count = found.size // rows
    best = found[:rows].copy()
    blocks = np.zeros(rows, np.int32)
    for block in range(1, count):
        for row in range(rows):
            number = found[block * rows + row]
            blocks[row] = block if number > best[row] else blocks[row]
            best[row] = max(number, best[row])
    for row in range(rows):
        begin = (row * count + blocks[row]) * BLOCK
        inside = first_of_largest(bits[begin : begin + BLOCK])
        places[row] = blocks[row] * BLOCK + inside
