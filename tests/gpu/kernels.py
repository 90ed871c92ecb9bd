"""Part (k): the kernels of the Gumbel-max rule against SGLang's sampler and the CPU engine's.

`python -m tests.gpu.kernels` prints their figures as JSON; the part runs it as a child process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tests.gpu.session import Line, Session

SHAPES = ((1, 49152), (8, 128256), (64, 151936), (256, 151936), (1024, 128256))
"""Rows and vocabularies that are timed."""
EQUALITY_ROWS = 512
EQUALITY_VOCABULARY = 32003
CALLS = 20


def kernels(session: Session, line: Line) -> None:
    """Compare tokens with the references, and time the kernels beside SGLang's."""
    if "cuda" not in session.settings.server_flags:
        line["note"] = "there is nothing to run without a GPU"
        return
    command = [sys.executable, "-m", "tests.gpu.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures = json.loads(done.stdout.splitlines()[-1])
    line |= figures
    equality = figures["equality"]
    if set(equality.values()) != {EQUALITY_ROWS, 1} or equality["alone"] != 1:
        raise RuntimeError(f"Not all tokens are those of the references: {equality}.")
    failed = [text for row in figures["microseconds"] for text in row.values() if type(text) is str]
    if failed:
        raise RuntimeError(failed[0])


def main() -> None:
    """Print the figures."""
    print(json.dumps({"equality": _equality(), "microseconds": _timings()}))


def _arguments(rows: int, vocabulary: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(rows)
    cpu = {
        "logits": (3 * torch.randn(rows, vocabulary, generator=rng)).to(dtype),
        "temperatures": torch.rand(rows, generator=rng) + 0.5,
        "seeds": torch.randint(-(2**62), 2**62, (rows,), generator=rng),
        "positions": torch.randint(0, 9000, (rows,), generator=rng),
    }
    return {name: tensor.cuda() for name, tensor in cpu.items()}


def _equality() -> dict[str, object]:
    """Return in how many rows the tokens are the references', without waiting for the device."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    from tlt_sglang.cpu.kernels import noise
    from tlt_sglang.sampling import triton_noise

    case = _arguments(EQUALITY_ROWS, EQUALITY_VOCABULARY, torch.float32)
    ks = torch.tensor([1 << 30, 1, 5, 300], dtype=torch.int32).repeat(EQUALITY_ROWS // 4)
    ps = torch.tensor([1.0, 1.0, 0.9, 0.5]).repeat(EQUALITY_ROWS // 4)
    mins = torch.tensor([0.0, 0.0, 0.05, 0.3]).repeat(EQUALITY_ROWS // 4)
    limits = {"top_ks": ks, "top_ps": ps, "min_ps": mins}
    on_device = {name: tensor.cuda() for name, tensor in limits.items()}
    triton_noise.sample(**case)  # the first call compiles
    triton_noise.sample(**case, **on_device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    sampled = triton_noise.sample(**case)
    again = triton_noise.sample(**case)
    filtered = triton_noise.sample(**case, **on_device)
    torch.cuda.set_sync_debug_mode("default")
    alone = triton_noise.sample(**{name: tensor[:1] for name, tensor in case.items()})
    z = case["logits"] / case["temperatures"].view(-1, 1)
    seeded = multinomial_with_seed(z, case["seeds"], case["positions"]).view(-1)
    on_host = {name: tensor.cpu() for name, tensor in case.items()}
    return {
        "rows": EQUALITY_ROWS,
        "again": int((sampled == again).sum()),
        "alone": int((sampled[:1] == alone).sum()),
        "of_sglang": int((sampled == seeded).sum()),
        "of_the_cpu_kernel": int((sampled.cpu() == noise.sample(**on_host)).sum()),
        "filtered_of_the_cpu_kernel": int(
            (filtered.cpu() == noise.sample(**on_host, **limits)).sum()
        ),
    }


def _timings() -> list[dict[str, object]]:
    """Return the microseconds of a call in a captured graph, ours and what it stands in for."""
    from tlt_sglang.sampling import triton_noise

    rows: list[dict[str, object]] = []
    for count, vocabulary in SHAPES:
        case = _arguments(count, vocabulary, torch.float32)
        logits, greedy = case["logits"], torch.zeros(count, dtype=torch.bool, device="cuda")
        ks = torch.full((count,), 50, dtype=torch.int32, device="cuda")
        ps = torch.full((count,), 0.95, device="cuda")
        calls: dict[str, Callable[[], object]] = {
            "sample": partial(triton_noise.sample, **case),
            "sample_top_k_top_p": partial(triton_noise.sample, **case, top_ks=ks, top_ps=ps),
            "scores": partial(triton_noise.scores, **case, greedy=greedy),
            "argmax": partial(logits.argmax, -1),
            "softmax": partial(logits.softmax, -1),
            "softmax_and_multinomial": partial(_softmax_and_multinomial, logits),
            "sglang_multinomial_with_seed": partial(_sglang, case),
        }
        row: dict[str, object] = {"rows": count, "vocabulary": vocabulary}
        rows.append(row | {name: _microseconds(call) for name, call in calls.items()})
    return rows


def _softmax_and_multinomial(logits: torch.Tensor) -> torch.Tensor:
    """Sample as SGLang does without a seed."""
    return torch.multinomial(logits.softmax(-1), 1)


def _sglang(case: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sample as SGLang does with a seed."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    z = case["logits"] / case["temperatures"].view(-1, 1)
    sampled: torch.Tensor = multinomial_with_seed(z, case["seeds"], case["positions"])
    return sampled


def _microseconds(call: Callable[[], object]) -> float | str:
    """Return the microseconds of a call, of many in one graph; why not, where it fails."""
    try:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call()
        graph.replay()
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        start, end = events
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return round(1000 * float(start.elapsed_time(end)) / CALLS, 1)
    except Exception as error:  # the others are timed whatever the reason
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}"[:200]


if __name__ == "__main__":
    main()
