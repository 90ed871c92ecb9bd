"""Kernels of the simulated device: what SGLang's own code launches, computed on the host.

Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Collection, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch

from tests.cuda import attention, graphs, older
from tlt_sglang.engine import verify_attention

ABSENT = {"sgl_kernel", "flash_mla", "sglang.kernels.ops.gemm.cutedsl_dual_gemm"}
"""Packages and modules that only a GPU machine can import."""


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is absent here: any name is there, and hardly one can be called."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ABSENT and name not in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            full = f"{module.__name__}.{name}"
            return PRESENT.get(full) or _Missing(full)

        module.__getattr__ = missing  # type: ignore[method-assign]
        module.__version__ = "0.4.10"  # type: ignore[attr-defined]


class _Missing:
    """A kernel that nothing here computes."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{self._name} has no stand-in")


def _build_tree(*args: Any) -> None:
    from tlt_sglang.cpu import kernels

    mask = args[3].view(torch.bool)  # which may be one of bytes
    build: Callable[..., None] = kernels.build_tree_kernel_efficient_cpu
    build(*args[:3], mask, *args[4:])


def _compile(name: str, *args: object, **kwargs: object) -> SimpleNamespace:
    """Stand for `load_jit`, which compiles a module of kernels with nvcc."""
    from tlt_sglang.cpu import kernels

    if name != "speculative_tree":
        raise RuntimeError(f"the kernels {name} have no stand-in")
    return SimpleNamespace(
        build_tree_kernel_efficient=graphs.kernel(_build_tree),
        verify_tree_greedy=graphs.kernel(kernels.verify_tree_greedy_cpu),
        reconstruct_indices_from_tree_mask=graphs.kernel(
            kernels.reconstruct_indices_from_tree_mask
        ),
    )


PRESENT: dict[str, Callable[..., Any]] = {
    "sgl_kernel.utils.is_arch_support_pdl": lambda: False,
}
"""Names of `sgl_kernel` that can be called."""


def _once_a_module(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the interpreter put its functions into a module for good: it takes milliseconds."""
    patched: set[int] = set()

    def patch_once(kernel: Any) -> Any:
        if id(kernel.__globals__) not in patched:
            patch(kernel)
            patched.add(id(kernel.__globals__))
        return SimpleNamespace(restore=lambda: None)

    return patch_once


def _replace(module: str, name: str, stand_in: Callable[..., object]) -> None:
    setattr(importlib.import_module(f"sglang.kernels.{module}"), name, stand_in)


def attention_kernels(module: str) -> Any:
    """Return SGLang's module of attention kernels with this name."""
    is_older = importlib.util.find_spec("sglang.kernels") is None
    package = "srt.layers.attention.triton_ops" if is_older else "kernels.ops.attention"
    return importlib.import_module(f"sglang.{package}.{module}")


def install(interpreted: Collection[str] = ()) -> None:
    """Put the kernels where SGLang looks for them; it has not been imported yet.

    Kernels for attention that are `interpreted` stay SGLang's own, and ours.
    """
    from triton.runtime import interpreter

    sys.meta_path.insert(0, _Absent())
    interpreter.GridExecutor.__call__ = graphs.kernel(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = _once_a_module(interpreter._patch_lang)
    if "row_slots" not in interpreted:
        verify_attention.row_slots = graphs.kernel(attention.row_slots)
    if importlib.util.find_spec("sglang.kernels") is None:
        ABSENT.update(older.ABSENT)
        PRESENT.update(older.present(_build_tree))
        older.install(_compile, interpreted)
        return
    _replace("jit.utils", "load_jit", _compile)
    for module, name, stand_in in (
        ("attention.decode_attention", "decode_attention_fwd", attention.decode),
        ("attention.extend_attention", "extend_attention_fwd", attention.extend),
    ):
        if name not in interpreted:
            _replace(f"ops.{module}", name, graphs.kernel(stand_in))
    # A kernel for many copies at once, where SGLang else uses torch's; slow in the interpreter.
    _replace("ops.memory.small_copy", "try_small_copy", lambda targets, sources: False)
