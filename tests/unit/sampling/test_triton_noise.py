"""The Triton kernel of the Gumbel-max rule: in Triton's interpreter against SGLang's own function,
token for token, and compiled for a GPU. Neither needs one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest
import torch

SHAPES = ((1, 1), (3, 7), (5, 1000), (2, 1024), (4, 1025), (3, 3100), (2, 9001))
"""Rows and vocabularies: below, at and above one block, several blocks, and several programs."""

LARGEST_ID = 3000
HASHES = torch.tensor([0, 1, 2, 12345, 2**31, 2**32 - 3, 2**32 - 2, 2**32 - 1])
Case = dict[str, torch.Tensor]
"""Arguments by name."""

PROGRAM = """
import sys
import torch
import triton
import triton.language as tl
from tlt_sglang.sampling import triton_noise

cases = torch.load(sys.argv[1])
results = {name: [getattr(triton_noise, name)(**case) for case in cases[name]]
           for name in ("argmax", "sample", "scores")}

@triton.jit
def noise(hashes, out, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out + places, triton_noise._noise(tl.load(hashes + places).to(tl.uint32)))

hashes = cases["hashes"]
results["noise"] = torch.empty(len(hashes), dtype=torch.float64)
noise[(1,)](hashes, results["noise"], BLOCK=len(hashes))
torch.save(results, sys.argv[1])
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tlt_sglang.sampling.triton_noise import BLOCK, SPAN, WIDE_BLOCK, _bests, _choice, _scores

types = {
    "logits": "*fp32", "temperatures": "*fp32", "seeds": "*i64", "positions": "*i64",
    "greedy": "*i1", "token_ids": "*i64", "width": "i32", "stride": "i32",
}
def check(kernel, types, **constants):
    # Triton takes an argument that is 1 as a constant, unless the kernel says otherwise.
    ones = [p.name for p in kernel.params if types.get(p.name) == "i32" and not p.do_not_specialize]
    for known in [constants | dict.fromkeys(ones, 1)] * (not value) + [constants]:
        source = ASTSource(kernel, types | dict.fromkeys(known, "constexpr"), known)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
    return compiled.asm["ptx"].replace("0x", "0d")

for value in (False, True):
    flags = {"MAY_BE_GREEDY": value, "RENAMED": value}
    parts = types | {"bests": "*fp64", "rows": "i32"}
    noise = [check(_bests, parts, **flags, BLOCK=BLOCK, SPAN=SPAN)]
    noise += [check(_scores, types | {"noisy": "*fp32"}, RENAMED=value, BLOCK=BLOCK)]
    whole = parts | {"filters": "*fp64", "chosen": "*i64", "parts": "i32"}
    choice = check(_choice, whole, **flags, FILTERED=value, PARTS=16, BLOCK=WIDE_BLOCK)
    # 2 ** 32 - 1 in float64: rounded to float32 it would be 2 ** 32.
    for ptx in noise + [choice] * value:
        assert "0d41EFFFFFFFE00000" in ptx
"""


class Results(TypedDict):
    """The tokens of every case, and the noise of HASHES."""

    argmax: list[torch.Tensor]
    sample: list[torch.Tensor]
    scores: list[torch.Tensor]
    noise: torch.Tensor


def run(program: str, *arguments: Path, **environment: str) -> None:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def arguments(rows: int, width: int, seed: int) -> Case:
    """Return random logits and parameters of rows."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "logits": 3 * torch.randn(rows, width, generator=rng),
        "temperatures": torch.rand(rows, generator=rng) + 0.5,
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=rng),
        "positions": torch.randint(0, 9000, (rows,), generator=rng),
    }


def argmax_cases() -> list[Case]:
    """Return arguments of `argmax`: odd sizes, tokens at -inf, ties, greedy rows, other ids."""
    cases = [arguments(*shape, seed) for seed, shape in enumerate(SHAPES)]
    infinite, halves, strided = (arguments(4, width, width) for width in (1025, 1026, 2050))
    infinite["logits"][:, ::3] = -torch.inf
    infinite["logits"][3] = -torch.inf
    halves["logits"] = halves["logits"].to(torch.bfloat16)
    strided["logits"] = strided["logits"][:, ::2]
    rng = torch.Generator().manual_seed(1)
    ids = torch.randperm(LARGEST_ID, generator=rng)[:1028].sort().values
    greedy = torch.tensor([True, False, True, False])
    renamed = arguments(4, 1028, 1) | {"token_ids": ids}
    mixed = arguments(4, 1027, 2) | {"greedy": greedy}
    return [*cases, infinite, halves, strided, renamed, mixed]


def score_cases() -> list[Case]:
    """Return arguments of `scores`: several blocks, a greedy row, other ids, strided halves."""
    greedy = torch.tensor([True, False, False, True])
    case, renamed = (arguments(4, width, width) | {"greedy": greedy} for width in (2050, 1028))
    halves = case | {"logits": case["logits"].to(torch.bfloat16)[:, ::2]}
    ids = torch.randperm(LARGEST_ID, generator=torch.Generator().manual_seed(2))[:1028]
    return [case, halves, renamed | {"token_ids": ids}]


def sample_cases() -> list[Case]:
    """Return arguments of `sample` with filters; the first row has none, the second is greedy."""
    ks = torch.tensor([1 << 30, 1, 5, 300], dtype=torch.int32)
    ps = torch.tensor([1.0, 1.0, 0.9, 0.5])
    mins = torch.tensor([0.0, 0.0, 0.05, 0.3])
    limits = ({"top_ks": ks}, {"top_ps": ps}, {"min_ps": mins})
    together = {"top_ks": ks, "top_ps": ps, "min_ps": mins}
    return [arguments(4, 1025, 20 + i) | part for i, part in enumerate((*limits, together))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Run the kernel in a process of its own: Triton reads the variable when it is imported."""
    path = tmp_path_factory.mktemp("interpreted") / "cases.pt"
    content = {
        "argmax": argmax_cases(),
        "sample": sample_cases(),
        "scores": score_cases(),
        "hashes": HASHES,
    }
    torch.save(content, path)
    run(PROGRAM, path, TRITON_INTERPRET="1")
    result: Results = torch.load(path)
    return result


@pytest.mark.sglang
def test_tokens_are_those_of_sglang(results: Results) -> None:
    from sglang.srt.layers.sampler import multinomial_with_seed

    for case, columns in zip(argmax_cases(), results["argmax"], strict=True):
        z = case["logits"].float() / case["temperatures"].view(-1, 1)
        if "token_ids" in case:  # the scores of all tokens, of which a few may be chosen
            z = torch.full((len(z), LARGEST_ID), -torch.inf).index_copy(1, case["token_ids"], z)
        expected = multinomial_with_seed(z, case["seeds"], case["positions"]).view(-1)
        if "greedy" in case:
            expected = torch.where(case["greedy"], z.argmax(-1), expected)
        got = case["token_ids"][columns] if "token_ids" in case else columns
        assert got.tolist() == expected.tolist()


def test_scores_are_what_the_choice_is_made_by(results: Results) -> None:
    from tlt_sglang.cpu.kernels import noise

    for case, scores in zip(score_cases(), results["scores"], strict=True):
        greedy, logits = case["greedy"], case["logits"].float()
        assert torch.equal(scores[greedy], logits[greedy])
        best, columns = noise.top(**(case | {"logits": logits}), k=5)
        assert torch.equal(scores.topk(5).indices[~greedy], columns[~greedy])
        torch.testing.assert_close(scores.topk(5).values[~greedy], best[~greedy])


def test_filters_are_those_of_the_cpu_engine(results: Results) -> None:
    from tlt_sglang.cpu.kernels import noise

    for case, tokens in zip(sample_cases(), results["sample"], strict=True):
        assert tokens.tolist() == noise.sample(**case).tolist()


def test_noise_of_every_hash_is_that_of_sglang(results: Results) -> None:
    x = HASHES.to(torch.float64) / torch.iinfo(torch.uint32).max
    x = x.log().clamp(min=torch.finfo(torch.float64).min, max=-(2.0**-32)).neg()
    torch.testing.assert_close(results["noise"], x.log().neg(), rtol=1e-14, atol=0)


def test_it_compiles_for_a_gpu(tmp_path: Path) -> None:
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))
