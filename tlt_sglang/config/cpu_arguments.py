"""SGLang's arguments on CPU: what its CPU engine needs, and what it does not serve.

Reads `config.json` files and the free memory. Runs wherever `ServerArgs` is resolved.
"""

from __future__ import annotations

from typing import Any

import psutil

from tlt_sglang.config.server_args import Arguments, Fields
from tlt_sglang.cpu import memory, ranks
from tlt_sglang.errors import ConfigError
from tlt_sglang.models import drafter_checkpoint as checkpoint

SGLANG_NGRAM_CAPACITY = 10_000_000
"""SGLang's default size of its n-gram corpus in nodes, which takes seconds to allocate on CPU."""
NGRAM_CAPACITY = 1_000_000
"""Our default on CPU, where a server decodes a tenth of the tokens."""


def cpu_fields(args: Arguments) -> Fields:
    """Return the fields that SGLang's CPU engine needs, and limits that suit it.

    Raises ConfigError for options that the CPU engine does not serve.
    """
    refuse_ranks(args)
    _refuse_formats(args)
    fields: Fields = {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        # On CPU nothing overlaps. Without speculation it would only make SGLang apply penalties,
        # and show tokens to custom logit processors, one step late.
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,
    }
    if args.max_running_requests is not None and args.max_running_requests < 1:
        raise ConfigError(
            f"--max-running-requests {args.max_running_requests} is not valid; give at least 1."
        )
    if args.max_running_requests is None:
        fields["max_running_requests"] = 16
    if args.speculative_ngram_capacity == SGLANG_NGRAM_CAPACITY:
        fields["speculative_ngram_capacity"] = NGRAM_CAPACITY
    model = checkpoint.read_config(args.model_path, "model")
    if model is not None:
        model = checkpoint.text_part(model)
        _refuse_model(model)
        _refuse_split(model, args.tp_size)
        if model.keys() >= memory.SHAPE:
            fields["max_total_tokens"] = _pool_tokens(model, args)
            if args.mem_fraction_static is None:
                # The size of the pool is set above; SGLang's own limit would count the memory of
                # other programs as ours.
                fields["mem_fraction_static"] = 0.95
    return fields


def _pool_tokens(model: dict[str, Any], args: Arguments) -> int:
    """Return the number of tokens of the KV pool of a local checkpoint, beside its weights."""
    available = psutil.virtual_memory().available
    weights = checkpoint.float32_bytes(args.model_path, model)
    memory.check_weights(weights, available)
    return memory.pool_tokens(model, available - weights, args.max_total_tokens)


def _refuse_model(model: dict[str, Any]) -> None:
    """Refuse models that the CPU engine does not serve."""
    layers = model.get("layer_types")
    problem = None
    if isinstance(layers, list) and any("sliding" in str(layer) for layer in layers):
        problem = "Models with sliding-window attention"
    elif model.get("quantization_config"):
        problem = "Quantised models"
    if problem:
        raise ConfigError(f"{problem} are not served on CPU; use another model, or a GPU.")


def _refuse_formats(args: Arguments) -> None:
    """Refuse formats other than float32 and pages of one token, which our kernels compute."""
    if args.page_size not in (None, 1):
        raise ConfigError(f"--page-size {args.page_size} is not served on CPU; use 1.")
    if args.dtype not in ("auto", "float32", "float"):
        raise ConfigError(f"--dtype {args.dtype} is not served on CPU; use float32.")
    if args.kv_cache_dtype != "auto":
        raise ConfigError(
            f"--kv-cache-dtype {args.kv_cache_dtype} is not served on CPU; leave it out."
        )
    if args.quantization is not None:
        raise ConfigError(f"--quantization {args.quantization} is not served on CPU; leave it out.")
    if args.attention_backend not in (None, "torch_native", "intel_amx"):
        raise ConfigError(
            f"--attention-backend {args.attention_backend} does not run on CPU; leave it out."
        )


def refuse_ranks(args: Arguments) -> None:
    """Refuse more ranks than cores, and kinds of parallelism that the CPU engine does not serve."""
    cores = ranks.cores()
    if args.tp_size > len(cores):
        raise ConfigError(
            f"--tp-size {args.tp_size} needs a core for each rank and there are {len(cores)}; "
            "lower it."
        )
    for name, size in (("--dp-size", args.dp_size), ("--pp-size", args.pp_size)):
        if size > 1:
            raise ConfigError(
                f"{name} {size} is not served on CPU; start with {name} 1, and one server for each "
                "replica."
            )


def _refuse_split(model: dict[str, Any], tp_size: int) -> None:
    """Refuse a model that does not split evenly over the ranks."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = model.get(name)
        if isinstance(count, int) and count % tp_size:
            raise ConfigError(
                f"--tp-size {tp_size} does not divide the model's {name}, {count}; choose one that "
                "does."
            )
