"""Runs a test in a process of its own, with a simulated device and the environment it needs.

What SGLang decides while it is imported, it decides there for the device; no other test sees it.
`python -m tests.cuda.apart MODULE FUNCTION ARGUMENTS` is that process.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")
ROOT = Path(__file__).parents[2]
INSIDE = "TLT_SIMULATED_DEVICE"
ENVIRONMENT = {
    INSIDE: "1",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    # Norms, activations and rotary embeddings are SGLang's own in torch.
    "SGLANG_FORCE_FUSED_OP_BACKEND": "torch",
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    "SGLANG_IS_FLASHINFER_AVAILABLE": "0",
    # The tree in Rust asks a tensor itself where it lies.
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}


def apart(test: Callable[P, None]) -> Callable[P, None]:
    """Return `test` as one that runs in a process of its own, and fails as it fails there."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if INSIDE in os.environ:
            return test(*args, **kwargs)
        # SGLang leaves the files of its sockets behind.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "tests.cuda.apart"),
                    *(Path(test.__code__.co_filename).stem, test.__name__),
                    json.dumps(kwargs, default=_plain),
                ],
                cwd=ROOT,
                env={name: value for name, value in os.environ.items() if "SGLANG" not in name}
                | ENVIRONMENT
                | {"TMPDIR": folder},
                capture_output=True,
                text=True,
                timeout=500,
            )
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]

    return run


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


def main(module: str, name: str, arguments: str) -> None:
    """Run a test of `tests.cuda`; paths among its arguments were made strings."""
    kwargs = json.loads(arguments)
    if "tmp_path" in kwargs:
        kwargs["tmp_path"] = Path(kwargs["tmp_path"])
    getattr(importlib.import_module(f"tests.cuda.{module}"), name)(**kwargs)


if __name__ == "__main__":
    main(*sys.argv[1:])
