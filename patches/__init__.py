"""Every change that TLT makes to SGLang: one file per upstream module, with a tuple `PATCHES`.

Patches are data: only this folder names what is patched, and only `tlt_sglang.patching.patcher`
applies it. Imported in every process that loads SGLang's plugins.
"""

from __future__ import annotations

import dataclasses
import importlib

from tlt_sglang.patching.patch import Patch

MODULES = (
    "activation",
    "allocation_sizing",
    "attention_registry",
    "base_config",
    "base_spec_worker",
    "batch_result_processor",
    "choices",
    "draft_utils",
    "eagle_utils",
    "eagle_worker_v2",
    "engine",
    "http_server",
    "io_struct",
    "layernorm",
    "llama",
    "llama_eagle3",
    "logits_processor",
    "logprob_processor",
    "mem_cache_registry",
    "memory_hook",
    "model_runner",
    "ngram_worker",
    "orchestrator",
    "output_streamer",
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
    "streaming_session",
    "tokenizer_control_mixin",
    "tokenizer_manager",
    "tp_worker",
    "unquant",
    "weight_updater",
)


def all_patches() -> tuple[Patch, ...]:
    """Return every patch in the order of `MODULES`, with the file that it comes from."""
    patches: list[Patch] = []
    for name in MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        patches += [dataclasses.replace(patch, file=f"{name}.py") for patch in module.PATCHES]
    return tuple(patches)
