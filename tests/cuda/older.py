"""The simulated device for an SGLang whose kernels lie in `sgl_kernel` and beside its code.

There kernels have no package of their own, norms and activations no backend in torch to choose, and
a scheduler gets each of its ranks as an argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch

from tests.cuda import attention, graphs
from tlt_sglang.cpu import kernels as on_cpu

SPARSE = "sglang.srt.layers.attention.dsa_backend"
ABSENT = {"flashinfer", SPARSE}
"""Further packages and modules that only a GPU machine can import."""


class _SparseBackend:
    """An attention backend that no model of the tests has."""


def _fast_topk(values: torch.Tensor, topk: int, dim: int) -> object:
    return torch.topk(values, topk, dim=dim)


def present(build_tree: Callable[..., None]) -> dict[str, Callable[..., Any]]:
    """Return the names of `sgl_kernel` that can be called."""
    names: dict[str, Callable[..., Any]] = {
        "build_tree_kernel_efficient": graphs.kernel(build_tree),
        "verify_tree_greedy": graphs.kernel(on_cpu.verify_tree_greedy_cpu),
        "speculative.reconstruct_indices_from_tree_mask": graphs.kernel(
            on_cpu.reconstruct_indices_from_tree_mask
        ),
        "fast_topk": _fast_topk,
    }
    return {f"sgl_kernel.{name}": function for name, function in names.items()} | {
        f"{SPARSE}.DeepseekSparseAttnBackend": _SparseBackend
    }


def _clamp_position(positions: torch.Tensor, lengths: torch.Tensor) -> None:
    positions.copy_((lengths - 1).clamp(min=0))


def _with_positions(compiled: Callable[..., object]) -> Callable[..., object]:
    """Return what stands for `load_jit`, which compiles one more module here."""
    module = SimpleNamespace(clamp_position=graphs.kernel(_clamp_position))

    def compile_(name: str, *args: object, **kwargs: object) -> object:
        return module if name == "clamp_position" else compiled(name, *args, **kwargs)

    return compile_


def install(compiled: Callable[..., object], interpreted: Collection[str]) -> None:
    """Put the kernels where SGLang looks for them; those of attention only if not `interpreted`."""
    utils: Any = importlib.import_module("sglang.jit_kernel.utils")
    utils.load_jit = _with_positions(compiled)
    for module, name, stand_in in (
        ("decode_attention", "decode_attention_fwd", attention.decode),
        ("extend_attention", "extend_attention_fwd", attention.extend),
    ):
        if name not in interpreted:
            home = importlib.import_module(f"sglang.srt.layers.attention.triton_ops.{module}")
            setattr(home, name, graphs.kernel(stand_in))
    operators: Any = importlib.import_module("sglang.srt.layers.utils.multi_platform")
    operators.MultiPlatformOp.dispatch_forward = lambda operator: operator.forward_native


def scheduler(arguments: object, ports: object) -> Any:
    """Return the scheduler of the only rank."""
    from sglang.srt.managers.scheduler import Scheduler

    ranks = dict.fromkeys(
        ("gpu_id", "tp_rank", "moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank"), 0
    )
    return Scheduler(arguments, ports, **ranks, dp_rank=None)
