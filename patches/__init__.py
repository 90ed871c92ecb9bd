"""Every change that TLT makes to SGLang: one file per upstream module, with a tuple `PATCHES`.

Patches are data: only this folder names what is patched, and only `tlt_sglang.patching.patcher`
applies it. A file here serves every shape of SGLang (`tlt_sglang.upstream.versions`); a folder
`v23` has what differs between shapes. `digests/` has, per version of SGLang, the digest of the
upstream source that each patch was written for. Imported in every process that loads SGLang's
plugins.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path

from tlt_sglang.patching.patch import Patch
from tlt_sglang.upstream import versions

DIGESTS = Path(__file__).parent / "digests"

SHARED = (
    "activation",
    "attention_registry",
    "base_config",
    "batch_result_processor",
    "communicator",
    "eagle_utils",
    "eagle_worker_v2",
    "http_server",
    "io_struct",
    "layernorm",
    "llama",
    "llama_eagle3",
    "logits_processor",
    "mem_cache_registry",
    "ngram_worker",
    "orchestrator",
    "parallel_state",
    "qwen2",
    "registry",
    "rotary_embedding_base",
    "sampler",
    "sampling_batch_info",
    "schedule_batch",
    "scheduler",
    "scheduler_weight_updater",
    "server_args",
    "serving_chat",
    "serving_tokenize",
    "spec_utils",
    "tokenizer_control_mixin",
    "tokenizer_manager",
    "tp_worker",
    "triton_backend",
    "unquant",
)
"""The files that serve every shape."""

_FROM_V16 = (
    "from_v16.allocation_sizing",
    "from_v16.base_spec_worker",
    "from_v16.eagle_worker_v2",
    "from_v16.model_runner",
    "from_v16.spec_utils",
    "from_v16.weight_updater",
)
"""The files of the shape v16 that later shapes share."""

_FROM_V19 = (
    *_FROM_V16,
    "from_v19.draft_utils",
    "from_v19.logprob_processor",
    "from_v19.memory_hook",
    "from_v19.server_args",
    "from_v19.streaming_session",
)
"""The files of the shape v19 that later shapes share."""

_FROM_V22 = (
    *_FROM_V19,
    "from_v22.allocation_sizing",
    "from_v22.batch_result_processor",
    "from_v22.choices",
    "from_v22.eagle_utils",
    "from_v22.eagle_worker_v2",
    "from_v22.engine_base",
    "from_v22.http_server",
    "from_v22.output_streamer",
    "from_v22.registry",
    "from_v22.schedule_batch",
    "from_v22.scheduler",
    "from_v22.scheduler_weight_updater",
    "from_v22.server_args",
    "from_v22.spec_utils",
    "from_v22.tokenizer_manager",
    "from_v22.weight_updater",
)
"""The files of the shape v22 that later shapes share."""

_BEFORE_V19 = (
    "v16.draft_utils",
    "v16.ngram_corpus",
    "v16.scheduler_weight_updater",
    "v16.server_args",
    "v16.tokenizer_manager",
    "v16.tp_worker",
    "v16.xgrammar_backend",
    "v17.tokenizer_manager",
    "v19.server_args",
    "v22.eagle_worker_v2",
    "v22.logits_processor",
    "v22.weight_checker",
)
"""The files that the shapes before v19 share."""

_V16 = (
    *_FROM_V16,
    *_BEFORE_V19,
    "v16.eagle_utils",
    "v16.logprob_processor",
    "v16.weight_updater",
    "v17.server_args",
)
"""The files of the shape v16."""

SHAPES: dict[str, tuple[str, ...]] = {
    "v15": (
        *_BEFORE_V19,
        "v15.batch_invariant_ops",
        "v15.cache_locs",
        "v15.cache_move",
        "v15.common",
        "v15.eagle",
        "v15.eagle_utils",
        "v15.eagle_worker_v2",
        "v15.llama",
        "v15.logprob",
        "v15.model_runner",
        "v15.ngram_worker",
        "v15.server_args",
        "v15.speculative_hook",
        "v15.srt_utils",
    ),
    "v16": _V16,
    "v17": (
        *_V16,
        "from_v22.batch_result_processor",
        "v17.eagle_draft_cuda_graph_runner",
        "v17.eagle_draft_extend_cuda_graph_runner",
        "v17.xgrammar_backend",
    ),
    "v19": (
        *_FROM_V19,
        "from_v22.batch_result_processor",
        "v16.eagle_utils",
        "v16.scheduler_weight_updater",
        "v16.tokenizer_manager",
        "v16.tp_worker",
        "v16.weight_updater",
        "v19.server_args",
        "v19.tokenizer_manager",
        "v22.eagle_worker_v2",
        "v22.logits_processor",
        "v22.weight_checker",
    ),
    "v22": (
        *_FROM_V22,
        "v22.eagle_worker_v2",
        "v22.logits_processor",
        "v22.tp_worker",
        "v22.weight_checker",
    ),
    "v23": (*_FROM_V22, "v23.eagle_utils"),
}
"""The further files of each shape, as "v23.eagle_utils"; a shape may use those of another."""


def patches_for(version: str) -> tuple[Patch, ...]:
    """Return the patches of an SGLang version. Raises EnvironmentProblem if it is not supported."""
    return patches_of(versions.shape_of(version))


def patches_of(shape: str) -> tuple[Patch, ...]:
    """Return the patches of a shape with their digests, in the order of its files."""
    return tuple(patch for name in (*SHARED, *SHAPES[shape]) for patch in _patches_in(name))


def all_patches() -> tuple[Patch, ...]:
    """Return every patch, also where several shapes have one of their own for a target."""
    names = dict.fromkeys((*SHARED, *(name for names in SHAPES.values() for name in names)))
    return tuple(patch for name in names for patch in _patches_in(name))


def _patches_in(name: str) -> list[Patch]:
    """Return the patches in a file, with its name and the digests of the versions it serves."""
    digests = {
        version: _digests(version)
        for version, shape in versions.SHAPES.items()
        if name in SHARED or name in SHAPES[shape]
    }
    return [
        dataclasses.replace(
            patch,
            file=f"{name.replace('.', '/')}.py",
            digests={v: all_[patch.target] for v, all_ in digests.items() if patch.target in all_},
        )
        for patch in importlib.import_module(f"{__name__}.{name}").PATCHES
    ]


@functools.cache
def _digests(version: str) -> Mapping[str, str]:
    """Return the digest of each target in a version, as `apply_patches.py` has written them."""
    path = DIGESTS / f"{version}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
