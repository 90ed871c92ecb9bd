"""CPU kernels against their plain references, on random shapes and types."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import reference_kernels as reference
from tlt_sglang.cpu import kernels, sampling
from tlt_sglang.cpu.kernels.argmax import BLOCK, argmax

SEEDS = range(12)
build_tree: Callable[..., None] = kernels.build_tree_kernel_efficient_cpu
reconstruct: Callable[..., None] = kernels.reconstruct_indices_from_tree_mask
STAND_IN = Path(kernels.__file__).parents[1] / "stand_in"


def rand(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def same(function: str, arguments: list[Any]) -> None:
    """Run kernel and reference on equal arguments and compare everything they wrote."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    getattr(kernels, function)(*arguments)
    getattr(reference, function)(*copies)
    for mine, plain in zip(arguments, copies, strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, plain)


@pytest.fixture(params=SEEDS)
def gen(request: pytest.FixtureRequest) -> torch.Generator:
    return torch.Generator().manual_seed(request.param)


def index_type(gen: torch.Generator) -> torch.dtype:
    return (torch.int32, torch.int64)[int(rand(gen, 0, 2))]


@pytest.mark.parametrize(
    "function", ["assign_req_to_token_pool_cpu", "assign_extend_cache_locs_cpu"]
)
def test_rows(function: str, gen: torch.Generator) -> None:
    batch, width = int(rand(gen, 1, 9)), int(rand(gen, 8, 64))
    table = rand(gen, 0, 1000, 10, width).int()
    start = rand(gen, 0, width // 2, batch)
    end = start + rand(gen, 0, width // 2, batch)
    total = int((end - start).sum())
    requests = torch.randperm(10, generator=gen)[:batch].to(index_type(gen))
    lengths = index_type(gen)
    locs = rand(gen, 0, 1000, total + 3)
    same(function, [requests, table, start.to(lengths), end.to(lengths), locs, width])


def test_draft_window(gen: torch.Generator) -> None:
    batch, topk, steps = int(rand(gen, 1, 9)), int(rand(gen, 1, 5)), int(rand(gen, 1, 5))
    table = rand(gen, 0, 1000, 10, 60).int()
    lengths = rand(gen, 0, 60 - topk * steps, batch).to(index_type(gen))
    requests = torch.randperm(10, generator=gen)[:batch]
    out = torch.zeros(batch * topk * steps, dtype=torch.int64)
    arguments = [requests, table, lengths, out, 60, topk, steps]
    same("assign_draft_cache_locs_contiguous_cpu", arguments)


def test_a_row_that_is_too_short_is_an_error() -> None:
    table, out = torch.zeros(2, 8, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    one, six = torch.tensor([1]), torch.tensor([6])
    with pytest.raises(IndexError, match="request 0"):
        kernels.assign_draft_cache_locs_contiguous_cpu(one, table, six, out, 8, 1, 4)
    with pytest.raises(IndexError, match="request 0"):
        kernels.assign_req_to_token_pool_cpu(torch.tensor([2]), table, one, six, out, 8)


def test_accepted_slots(gen: torch.Generator) -> None:
    batch, width = int(rand(gen, 1, 9)), int(rand(gen, 1, 6))
    index = rand(gen, -1, 30, batch, width).to(index_type(gen))
    slots, out = rand(gen, 0, 1000, 30), torch.zeros(batch * width, dtype=torch.int64)
    same("fill_accept_out_cache_loc_cpu", [index, slots, out])


def test_bonus_tokens(gen: torch.Generator) -> None:
    batch, width = int(rand(gen, 1, 9)), int(rand(gen, 1, 6))
    tokens = rand(gen, 0, 1000, batch, width).to(index_type(gen))
    lengths = rand(gen, 1, width + 1, batch).to(index_type(gen))
    same("fill_bonus_tokens_cpu", [tokens, lengths, torch.zeros(batch).int(), width])


@pytest.mark.parametrize("selected", [False, True])
def test_rotation(selected: bool, gen: torch.Generator) -> None:
    batch = int(rand(gen, 1, 6))
    lengths = rand(gen, 0, 7, batch)
    start = lengths.cumsum(0) - lengths
    ids = rand(gen, 0, 1000, int(lengths.sum()))
    new = rand(gen, 0, 1000, batch, 1).to(index_type(gen))
    last = start + (lengths - 1).clamp(min=0) // 2 if selected else None
    same("rotate_input_ids_cpu", [ids, start.int(), lengths.int(), new, last])


def test_kv_rows_move_at_once_in_every_buffer(gen: torch.Generator) -> None:
    shapes = [(20, 3, 8), (20, 5), (20, 7, 1)]
    dtypes = [torch.float32, torch.bfloat16, torch.int8]
    pool = [rand(gen, -100, 100, *s).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    plain = [buffer.clone() for buffer in pool]
    count = int(rand(gen, 0, 12))
    target = torch.randperm(20, generator=gen)[:count]
    source = rand(gen, 0, 20, count).to(index_type(gen))
    for buffers, module in ((pool, kernels), (plain, reference)):
        addresses = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64)
        strides = torch.tensor([b.stride(0) * b.itemsize for b in buffers])
        module.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
    assert all(torch.equal(a, b) for a, b in zip(pool, plain, strict=True))


def drafted(gen: torch.Generator, batch: int, topk: int, depth: int, n: int) -> list[torch.Tensor]:
    """Candidates as EAGLE lays them out: the best n - 1 by path score, with their parents."""
    scores = torch.rand(batch, topk, generator=gen)
    all_scores, frontier = [scores], torch.arange(topk).expand(batch, topk)
    parents = [torch.arange(-1, topk).expand(batch, -1)]
    for step in range(1, depth):
        scores = (scores.unsqueeze(2) * torch.rand(batch, topk, topk, generator=gen)).flatten(1)
        all_scores.append(scores)
        scores, frontier = scores.topk(topk)
        parents.append(frontier + topk**2 * (step - 1) + topk)
    selected = torch.cat(all_scores, 1).topk(n - 1).indices.sort().values
    if depth == 1:
        return [torch.empty(batch, 0, dtype=torch.int64), selected]
    return [torch.cat(parents[:-1], 1), selected]


def tree_outputs(batch: int, n: int, cells: int) -> list[torch.Tensor]:
    tables = torch.full((3, batch, n), -1)
    return [torch.ones(cells, dtype=torch.bool), torch.zeros(batch * n).long(), *tables]


@pytest.mark.parametrize("mode", [0, 1])
def test_tree(mode: int, gen: torch.Generator) -> None:
    batch, topk, depth = int(rand(gen, 1, 6)), int(rand(gen, 1, 6)), int(rand(gen, 1, 6))
    n = int(rand(gen, 2, min(topk + (depth - 1) * topk**2, 20) + 2))
    lengths = rand(gen, 0, 30, batch)
    parents, selected = drafted(gen, batch, topk, depth, n)
    cells = batch * n * n + (n * int(lengths.sum()) if mode == 0 else 0)
    outputs = tree_outputs(batch, n, cells)
    arguments = [parents, selected, lengths.to(index_type(gen)), *outputs, topk, depth, n, mode]
    same("build_tree_kernel_efficient_cpu", arguments)

    if mode == 1:
        again = tree_outputs(batch, n, cells)
        again[0] = outputs[0]
        reconstruct(again[0], lengths, *again[1:], batch, n)
        assert all(torch.equal(a, b) for a, b in zip(again, outputs, strict=True))


def test_tree_refuses_outputs_that_are_too_small() -> None:
    lengths, parents, selected = torch.tensor([5]), torch.zeros(1, 0), torch.zeros(1, 3).long()
    outputs = tree_outputs(1, 4, 15)
    with pytest.raises(ValueError, match="too small"):
        build_tree(parents, selected, lengths, *outputs, 4, 1, 4, 1)
    with pytest.raises(NotImplementedError, match="mode 2"):
        build_tree(parents, selected, lengths, *outputs, 4, 1, 4, 2)


def test_tree_from_any_mask(gen: torch.Generator) -> None:
    batch, n = int(rand(gen, 1, 6)), int(rand(gen, 1, 18))
    mask = torch.rand(batch, n, n, generator=gen) < 0.3
    lengths = rand(gen, 0, 30, batch).to(index_type(gen))
    _, *outputs = tree_outputs(batch, n, 0)
    same("reconstruct_indices_from_tree_mask", [mask.flatten(), lengths, *outputs, batch, n])


def test_greedy_verification(gen: torch.Generator) -> None:
    batch, topk, depth, n = int(rand(gen, 1, 6)), 3, 4, int(rand(gen, 2, 14))
    outputs = tree_outputs(batch, n, batch * n * n)
    lengths = rand(gen, 0, 30, batch)
    parents, selected = drafted(gen, batch, topk, depth, n)
    build_tree(parents, selected, lengths, *outputs, topk, depth, n, 1)
    width = int(rand(gen, 1, depth + 2))
    written = [
        torch.zeros(batch * n).int(),
        torch.full((batch, width), -1).int(),
        torch.zeros(batch).int(),
    ]
    tokens, target = rand(gen, 0, 4, batch, n).to(index_type(gen)), rand(gen, 0, 4, batch, n)
    same("verify_tree_greedy_cpu", [*written, tokens, *outputs[2:], target])


def test_greedy_batches_are_verified_by_their_largest_logits(gen: torch.Generator) -> None:
    batch, topk, depth, n = int(rand(gen, 1, 6)), 3, 4, int(rand(gen, 2, 14))
    outputs = tree_outputs(batch, n, batch * n * n)
    parents, selected = drafted(gen, batch, topk, depth, n)
    build_tree(parents, selected, rand(gen, 0, 30, batch), *outputs, topk, depth, n, 1)
    logits = rand(gen, 0, 3, batch * n, 5).float()  # with many ties
    logits[0, 2] = float("nan")
    drafts = rand(gen, 0, 5, batch * n)
    tree = SimpleNamespace(
        draft_token_num=n,
        max_tree_depth=depth + 1,
        draft_token=drafts,
        retrieve_index=outputs[2],
        retrieve_next_token=outputs[3],
        retrieve_next_sibling=outputs[4],
    )
    tokens = torch.zeros(batch * n).int()
    rows = torch.full((batch, depth + 1), -1).int()
    correct = torch.zeros(batch).int()
    inputs: list[Any] = [drafts.view(batch, n), *outputs[2:], logits.argmax(-1).view(batch, n)]
    reference.verify_tree_greedy_cpu(tokens, rows, correct, *inputs)
    result = sampling.verify_greedy(tree, logits)
    for mine, plain in zip(result, (tokens, correct + 1, rows), strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, plain)


def test_without_drafts_the_targets_tokens_are_committed(gen: torch.Generator) -> None:
    """As the kernel would tell of trees of one node."""
    batch = int(rand(gen, 1, 9))
    logits = rand(gen, 0, 3, batch, 5).float()
    alone = torch.full((batch, 1), -1)
    nodes = (torch.arange(batch).view(-1, 1), alone, alone)
    tree = SimpleNamespace(draft_token_num=1, max_tree_depth=1)
    tokens, rows, correct = torch.zeros(batch).int(), alone.int(), torch.zeros(batch).int()
    last, expected = rand(gen, 0, 5, batch).view(-1, 1), logits.argmax(-1).view(-1, 1)
    reference.verify_tree_greedy_cpu(tokens, rows, correct, last, *nodes, expected)
    result = sampling.verify_greedy(tree, logits)
    for mine, plain in zip(result, (tokens, correct + 1, rows), strict=True):
        assert mine.dtype == plain.dtype and torch.equal(mine, plain)


@pytest.mark.parametrize("width", [1, 5, BLOCK, 3 * BLOCK + 7, 49_152])
def test_argmax(width: int, gen: torch.Generator) -> None:
    rows = int(rand(gen, 1, 7))
    wider = rand(gen, -4, 4, rows, width + 3).float()  # with many ties
    logits = wider[:, :width]
    assert torch.equal(argmax(logits), logits.argmax(-1))
    logits[0] = -float("inf")
    logits[-1, width // 2 :] = float("nan")
    logits[-1, width - 1] *= -1
    assert torch.equal(argmax(logits), logits.argmax(-1))
    assert torch.equal(argmax(wider.T), wider.T.argmax(-1))


def test_hash(gen: torch.Generator) -> None:
    seeds = rand(gen, -(2**62), 2**62, 5).to(torch.uint64)
    positions, columns = rand(gen, 0, 2**31, 5), rand(gen, 0, 2**31, 17)
    hashed = kernels.murmur_hash32_cpu(seeds, positions, columns)
    assert torch.equal(hashed, reference.murmur_hash32_cpu(seeds, positions, columns))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, dtype=torch.int64), torch.zeros(6, dtype=torch.int32)[::2]]
)
def test_an_output_that_would_have_to_be_copied_is_an_error(tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="bonus_tokens"):
        kernels.fill_bonus_tokens_cpu(torch.zeros(3, 1), torch.ones(3), tensor, 1)


def test_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.delitem(sys.modules, "sgl_kernel.speculative", raising=False)
    module = importlib.import_module("sgl_kernel")
    for name in module.__all__:
        assert name == "speculative" or callable(getattr(kernels, name))
    lens = torch.tensor([2, 1], dtype=torch.int32)
    inputs = (torch.arange(6).view(2, 3), lens)
    ids = [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    for kernel, out in zip((module, kernels), ids, strict=True):
        kernel.fill_bonus_tokens_cpu(*inputs, out, 3)
    assert torch.equal(*ids)
    assert ids[0].any()
    assert not hasattr(module, "rmsnorm")
    with pytest.raises(ImportError, match="needs the compiled sgl_kernel"):
        exec("from sgl_kernel import rmsnorm")
    hashed = torch.ops.sgl_kernel.murmur_hash32_cpu.default(*[torch.arange(3)] * 3)
    assert torch.equal(hashed, kernels.murmur_hash32_cpu(*[torch.arange(3)] * 3))
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")
