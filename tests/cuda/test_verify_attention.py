"""Attention of verified rows is bitwise that of decode steps, with the Triton backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cuda.apart import apart
from tlt_sglang.strategy.strategies import parse

if TYPE_CHECKING:
    import torch

LENGTH = 40
TREE = "eagle3:3x4x8"
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tlt_sglang.engine.verify_attention import BLOCK, _copy, _lengths

def check(kernel, types, **constants):
    types = types | dict.fromkeys(constants, "constexpr")
    target = GPUTarget("cuda", 90, 32)
    assert compile(ASTSource(kernel, types, constants), target=target).asm["cubin"]

tables = {"prefix_indptr": "*i32", "mask": "*i1", "mask_indptr": "*i64"}
slots = {"prefix_slots": "*i64", "new_slots": "*i64", "indptr": "*i32", "slots": "*i64"}
for masked in (False, True):
    for width, columns in ((1, 1), (6, 8), (8, 8)):
        shape = {"WIDTH": width, "COLUMNS": columns, "MASKED": masked}
        check(_lengths, tables | {"lengths": "*i32"}, **shape)
        check(_copy, tables | slots, **shape, BLOCK=BLOCK)
"""


@apart
def test_rows_are_attended_to_as_requests_of_a_decode_step() -> None:
    """Trees, chains and no mask: SGLang's decode kernel gives each row the same bits."""
    import torch

    from tests.cuda import attention, graphs

    graphs.install()
    from tests.cuda import kernels

    kernels.install(("decode_attention_fwd", "row_slots"))
    decode_attention_fwd = kernels.attention_kernels("decode_attention").decode_attention_fwd

    from tlt_sglang.engine.verify_attention import row_slots

    torch.manual_seed(0)
    heads, kv_heads, dim, width, prefixes = 4, 2, 16, 4, [3, 0, 300]
    paths = {
        "tree": [[0], [0, 1], [0, 2], [0, 2, 3]],
        "chain": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
        "no mask": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
    }

    def attend(q: torch.Tensor, indptr: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Run the decode kernel with as many splits as deterministic inference has."""
        lengths = indptr[1:] - indptr[:-1]
        splits = (lengths + 255) // 256
        most = -(-max(prefixes) // 256) + 1
        logits, sums = torch.zeros(len(q), heads, most, dim), torch.zeros(len(q), heads, most)
        out = torch.zeros_like(q)
        tables = out, indptr, slots, logits, sums, splits
        decode_attention_fwd(q, k_cache, v_cache, *tables, most, 0.25, 1.0, 1.0)
        return out

    with torch.device("cuda"):
        count = sum(prefixes) + width * len(prefixes)
        k_cache, v_cache = torch.randn(2, count, kv_heads, dim)
        q = torch.randn(width * len(prefixes), heads, dim)
        places = torch.randperm(count)
        prefix_slots, new_slots = places[: sum(prefixes)], places[sum(prefixes) :]
        starts = torch.tensor([0, *prefixes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for name, of in paths.items():
            masks = [torch.zeros(width, prefix + width, dtype=torch.bool) for prefix in prefixes]
            for one, prefix in zip(masks, prefixes, strict=True):
                one[:, :prefix] = True
                for row, path in enumerate(of):
                    one[row, prefix + torch.tensor(path)] = True
            mask = None if name == "no mask" else torch.cat([one.flatten() for one in masks])
            sizes = [0, *(one.numel() for one in masks)]
            tables = mask, torch.tensor(sizes).cumsum(0)
            most = width * (sum(prefixes) + width * len(prefixes))
            made = row_slots(starts, prefix_slots, new_slots, *tables, most)
            lengths, indptr, slots = made
            stand_in = attention.row_slots(starts, prefix_slots, new_slots, *tables, most)
            used = int(indptr[-1])
            for one, other in zip(made, stand_in, strict=True):
                assert one[:used].tolist() == other[:used].tolist()
            together = attend(q, indptr, slots)
            for number in range(len(q)):
                request, row = divmod(number, width)
                first = int(starts[request])
                before = prefix_slots[first : first + prefixes[request]]
                path_slots = new_slots[request * width + torch.tensor(of[row])]
                expected = torch.cat([before, path_slots])
                begin, length = int(indptr[number]), int(lengths[number])
                assert slots[begin : begin + length].tolist() == expected.tolist()
                alone = torch.tensor([0, length], dtype=torch.int32)
                output = attend(q[number : number + 1], alone, expected)
                assert torch.equal(together[number], output[0])


@apart
def test_verify_steps_of_a_pool_run_the_decode_kernel(tmp_path: Path) -> None:
    """From captured graphs, too, over random switches; the tokens are plain decoding's."""
    from tests.cuda import attention
    from tests.cuda.engine import MOST_REQUESTS, Engine
    from tlt_sglang.engine import engine as process

    rows: set[int] = set()
    decode = attention.decode

    def noted(q: torch.Tensor, *args: Any, **options: Any) -> None:
        rows.add(len(q))
        decode(q, *args, **options)

    attention.decode = noted
    strategies = f"off,eagle3:1x1x2,{TREE},ngram:8"
    engine = Engine(tmp_path, policy="random", strategies=strategies)
    expected = engine.expected(LENGTH)
    rows.clear()
    telemetry = process.require().step.telemetry
    assert telemetry is not None
    while len(telemetry.tallies) < 4 or telemetry.switches < 20:
        assert engine.generate(LENGTH) == expected
    # A decode step has a row for each request, one of a drafter's with four candidates four.
    assert MOST_REQUESTS * parse(TREE).num_draft_tokens in rows


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
