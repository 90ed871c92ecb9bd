"""Products of a few rows with a large weight, at the speed at which memory delivers the weight.

A decode step multiplies one row per request, a verify step a few more, and both read every weight
once. Libraries are tuned for many rows; with few they lose up to half of the memory's bandwidth.
Here a weight is stored in blocks of `BLOCK` outputs, so that a thread reads a block sequentially
while the sums of up to `TILE` rows stay in registers. More rows need more passes over a block,
which is in the cache by then; so the passes prefetch the next block in equal shares, and it arrives
while the sums are computed.

Each sum runs over K in order, for any number of rows: a row's result does not depend on the rows
beside it and is that of a float32 product.

A weight may be stored in eight bits with a scale per output, a quarter of the memory to read. Its
numbers are converted to float32 before they are multiplied.

Shapes: T rows, K inputs, N outputs.

Runs in the scheduler process. Knows nothing of SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.ir import Value
from numba import carray, cfunc, types

from tlt_sglang.cpu.kernels import emit
from tlt_sglang.cpu.kernels.argmax import first_of_largest, largest_key
from tlt_sglang.cpu.kernels.compile import Array, inline, kernel
from tlt_sglang.cpu.kernels.emit import F32, I32, I64
from tlt_sglang.cpu.kernels.team import next_item, pointer_to, start
from tlt_sglang.cpu.kernels.vector import silu_row

BLOCK = 32 if emit.WIDE else 16
"""Outputs that are summed together, in two registers."""
TILE = 12 if emit.WIDE else 6
"""Rows that are summed together, with two registers each of the CPU's 32 or 16."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] stored in blocks."""

    blocks: torch.Tensor  # [ceil(N / BLOCK), K, BLOCK] float32 or int8
    scales: torch.Tensor  # [padded] float32; [0] for float32 weights
    outputs: int
    padded: int  # outputs of all blocks
    data: Array  # arguments of the task; `multiply` fills in those of a call
    address: int  # address of `data`

    @property
    def halves(self) -> bool:
        """Return whether each half is made of whole blocks, as `multiply_gated` requires."""
        return self.outputs % (2 * BLOCK) == 0


def pack(weight: torch.Tensor, narrow: bool = False, reuse: Packed | None = None) -> Packed:
    """Return a copy of `weight` [N, K] float32 in blocks; with `narrow` in eight bits.

    An older copy that nobody needs any more is overwritten, if it has the same shape.
    """
    outputs, inputs = weight.shape
    # Eight bits: the scale of an output maps its largest weight to 127.
    scales = weight.new_empty(0)
    if narrow:
        scales = weight.abs().amax(dim=1).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
        weight = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
    # Blocks; the last one is padded with zeros.
    whole, rest = divmod(outputs, BLOCK)
    count = whole + (rest > 0)
    shape = (count, inputs, BLOCK)
    if reuse is not None and (
        (reuse.outputs, reuse.blocks.shape, reuse.blocks.dtype) != (outputs, shape, weight.dtype)
    ):
        reuse = None
    blocks = weight.new_zeros(shape) if reuse is None else reuse.blocks
    blocks[:whole] = weight[: whole * BLOCK].view(whole, BLOCK, inputs).transpose(1, 2)
    if rest:
        blocks[whole, :, :rest] = weight[whole * BLOCK :].T
    scales = torch.nn.functional.pad(scales, (0, count * BLOCK - outputs)) if narrow else scales
    if reuse is not None:
        reuse.scales.copy_(scales)
        return reuse
    data = np.zeros(10, np.int64)
    data[1:5] = blocks.data_ptr(), count, inputs, narrow
    data[8] = scales.data_ptr()
    return Packed(blocks, scales, outputs, count * BLOCK, data, data.ctypes.data)


def multiply(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Multiply x [T, K] float32, contiguous, with the transposed weight -> [T, N].

    Not reentrant for a weight: its calls share the memory of the task's arguments.
    """
    out = _multiply(x, packed)
    return out if packed.outputs == packed.padded else out[:, : packed.outputs].contiguous()


def multiply_largest(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply as `multiply` does, and return the argmax of each row [T] as torch.argmax has it.

    The argmax is None for a weight that does not fill its blocks. The thread that has just computed
    a block determines its largest number; later a row would be spread over the caches of all cores.
    """
    if packed.outputs != packed.padded:
        return multiply(x, packed), None
    rows = x.shape[0]
    keys = np.empty((packed.padded // BLOCK, rows), np.int32)
    indices = torch.empty(rows, dtype=torch.int64)
    out = _multiply(x, packed, keys.ctypes.data)
    _argmax_of_blocks(keys.reshape(-1), out.numpy().view(np.int32).reshape(-1), indices.numpy())
    return out, indices


def _multiply(x: torch.Tensor, packed: Packed, keys: int = 0) -> torch.Tensor:
    """Compute all outputs of all blocks.

    The largest sort key of each block is written to the address `keys`, unless it is 0.
    """
    rows, data = x.shape[0], packed.data
    out = torch.empty((rows, packed.padded), dtype=torch.float32)
    data[0], data[5], data[6], data[7], data[9] = 0, rows, x.data_ptr(), out.data_ptr(), keys
    start(True)(_task.address, packed.address)
    return out


def multiply_gated(x: torch.Tensor, out: torch.Tensor, packed: Packed) -> None:
    """Compute the first half of an MLP: out [T, N / 2] = silu(gate) * up.

    x [T, K] times the weight has the gate in its first half and up in its second; all are float32
    and contiguous, and the weight must have `halves`. The same thread computes both and combines
    them while they are in its cache.
    """
    data = packed.data
    data[0], data[5], data[6], data[7] = 0, x.shape[0], x.data_ptr(), out.data_ptr()
    start(True)(_gated_task.address, packed.address)


def _products(narrow: bool) -> Any:
    """Return a function for kernels that multiplies all rows with one block.

    Its arguments are the addresses of x, the block, its scales, the sums and the next block; then
    K, the floats from one row of sums to the next, and T.
    """

    def generate(
        b: ir.IRBuilder,
        x: Value,
        block: Value,
        scales: Value,
        sums: Value,
        next_block: Value,
        inputs: Value,
        stride: Value,
        rows: Value,
    ) -> None:
        size = BLOCK * (1 if narrow else 4)
        # A single pass prefetches the whole next block; of several passes the first prefetches
        # one half and the others the second.
        pace = b.select(b.icmp_signed("<=", rows, I64(TILE)), I64(size), I64(size // 2))
        half = b.add(next_block, b.mul(inputs, pace))

        def emit_tile(count: int, first: Value) -> None:
            tile_x, tile_sums = (
                emit.step(b, at, b.mul(first, size), 4)
                for at, size in ((x, inputs), (sums, stride))
            )
            prefetched = b.select(b.icmp_signed("==", first, I64(0)), next_block, half)
            scale = scales if narrow else None
            _generate_sums(
                b, count, tile_x, block, scale, tile_sums, prefetched, pace, inputs, stride
            )

        emit.in_tiles(b, rows, TILE, emit_tile)

    return emit.function(generate)


def _generate_sums(
    b: ir.IRBuilder,
    rows: int,
    x: Value,
    block: Value,
    scales: Value | None,
    sums: Value,
    prefetched: Value,
    pace: Value,
    inputs: Value,
    stride: Value,
) -> None:
    """Emit the sums of `rows` rows, one input after the other.

    Without `scales` the block holds floats. Each input prefetches the next `pace` bytes from the
    address `prefetched` on.
    """
    vector, size = emit.floats(BLOCK), 4 if scales is None else 1
    stored = vector if scales is None else ir.VectorType(ir.IntType(8), BLOCK)
    before, loop, after = b.block, b.append_basic_block("input"), b.append_basic_block("summed")
    b.branch(loop)

    # For each input: the weights of the block times the number of each row.
    b.position_at_end(loop)
    k = b.phi(I64)
    totals = [b.phi(vector) for _ in range(rows)]
    address = emit.step(b, block, k, BLOCK * size)
    weights = b.load(b.inttoptr(address, stored.as_pointer()), align=size)
    emit.prefetch(b, b.add(prefetched, b.mul(k, pace)), BLOCK * size)
    if scales is not None:
        weights = b.sitofp(b.sext(weights, ir.VectorType(I32, BLOCK)), vector)
    results = []
    for row, total in enumerate(totals):
        number = b.load(emit.at(b, x, b.add(k, b.mul(inputs, I64(row))), 4, F32), align=4)
        spread = emit.broadcast(b, number, BLOCK)
        results.append(emit.multiply_add(b, spread, weights, total))
        total.add_incoming(ir.Constant(vector, [0.0] * BLOCK), before)
        total.add_incoming(results[-1], loop)
    following = b.add(k, I64(1))
    k.add_incoming(I64(0), before)
    k.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, inputs), loop, after)

    # After the last input: scale and store.
    b.position_at_end(after)
    if scales is not None:
        factors = b.load(b.inttoptr(scales, vector.as_pointer()), align=4)
        results = [b.fmul(result, factors) for result in results]
    for row, result in enumerate(results):
        b.store(result, emit.at(b, sums, b.mul(stride, I64(row)), 4, vector), align=4)


_plain_products, _narrow_products = _products(narrow=False), _products(narrow=True)


@inline()
def _block(data: Array, index: int, following: int, sums: int, stride: int) -> None:
    """Multiply all rows with block `index` and write to the address `sums`.

    `stride` is the number of floats from one row of sums to the next. `following` is the index of
    the next block, or the number of blocks or more if there is none.
    """
    blocks, inputs, narrow, rows, x, scales = data[1], data[3], data[4], data[5], data[6], data[8]
    size = inputs * BLOCK * (1 if narrow else 4)
    block, next_block = blocks + index * size, blocks + min(following, data[2] - 1) * size
    scale = scales + index * BLOCK * 4
    if narrow:
        _narrow_products((x, block, scale, sums, next_block, inputs, stride, rows))
    else:
        _plain_products((x, block, scale, sums, next_block, inputs, stride, rows))


def _work(pointer: int) -> None:
    """Run on each thread of the team: take one block after the other."""
    data = carray(pointer, (10,), np.int64)
    count, rows, out, keys = data[2], data[5], data[7], data[9]
    item = next_item(data.ctypes.data)
    while item < count:
        following = next_item(data.ctypes.data)
        sums, stride = out + item * BLOCK * 4, count * BLOCK
        _block(data, item, following, sums, stride)
        if keys != 0:
            block_keys = carray(pointer_to(keys + item * rows * 4), (rows,), np.int32)
            for row in range(rows):
                start_of_row = pointer_to(sums + row * stride * 4)
                block_keys[row] = largest_key(carray(start_of_row, (BLOCK,), np.int32))
        item = following


_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_work)


def _gated_work(pointer: int) -> None:
    """Run on each thread for `multiply_gated`: take a block of the gate and its block of up."""
    data = carray(pointer, (10,), np.int64)
    half, rows = data[2] // 2, data[5]
    # The buffers are padded to an even number of rows, so that the loop that combines them has
    # whole vectors only: LLVM may compute a remainder with other rounding.
    flat = (rows + 1) // 2 * 2 * BLOCK
    sums, joined = np.zeros((2, flat), np.float32), np.empty(flat, np.float32)
    ints = np.empty(flat, np.int32)
    active = carray(pointer_to(data[7]), (rows, half, BLOCK), np.float32)
    item = next_item(data.ctypes.data)
    while item < half:
        following = next_item(data.ctypes.data)
        for side in range(2):
            index = item + side * half
            then = following if side else item + half
            _block(data, index, then, sums.ctypes.data + side * flat * 4, BLOCK)
        silu_row(sums[0], sums[1], joined, ints)
        for row in range(rows):
            for i in range(BLOCK):
                active[row, item, i] = joined[row * BLOCK + i]
        item = following


_gated_task = cfunc(types.void(types.voidptr), nopython=True, cache=True)(_gated_work)


@kernel("void(int32[::1], int32[::1], int64[::1])")
def _argmax_of_blocks(keys: Array, bits: Array, indices: Array) -> None:
    """Write the first index of the largest number of each row into indices [T].

    `keys` [blocks, T] are the largest sort keys of the blocks, `bits` [T, outputs] the numbers.
    """
    rows = indices.size
    if rows == 0:
        return
    # The first block with the largest key.
    count = keys.size // rows
    best = keys[:rows].copy()
    blocks = np.zeros(rows, np.int32)
    for block in range(1, count):
        for row in range(rows):
            key = keys[block * rows + row]
            blocks[row] = block if key > best[row] else blocks[row]
            best[row] = max(key, best[row])
    # The first index in that block.
    for row in range(rows):
        begin = (row * count + blocks[row]) * BLOCK
        inside = first_of_largest(bits[begin : begin + BLOCK])
        indices[row] = blocks[row] * BLOCK + inside
