"""Device memory that TLT takes beside weights, KV cache and the graphs of one strategy.

SGLang sizes its KV cache by what it expects to take itself. Pure, except that it reads
`config.json` files; runs where `ServerArgs` is resolved. A sidecar on the same device is not
counted, as it starts and stops: `sidecar_bytes` estimates it for `tlt plan`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tlt_sglang.config.server_args import Arguments
from tlt_sglang.config.settings import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import BATCH_SIZES, plan_for_model
from tlt_sglang.graphs.sizes import ModelSizes
from tlt_sglang.harvest.log_size import PENDING_BYTES, log_bytes
from tlt_sglang.models import drafter_checkpoint as checkpoint

PREFILL = 8192
"""Tokens of a prefill where SGLang does not say."""
SLOT_BYTES = 8
"""Bytes of a KV slot's number in the lists of verified rows."""
KV_SPLITS = 8
"""Parts of a context in SGLang's decode kernel, the default of --triton-attention-num-kv-splits."""
SIDECAR_COPIES = 5
"""Copies of a drafter's trained weights in float32: the weights, the version in use, gradients, and
two moments of the optimizer."""
SIDECAR_GB = 1.5
"""A sidecar's CUDA context, and the logits of a micro-batch."""


def reserved_bytes(config: Config, args: Arguments) -> int:
    """Return the bytes of a pool's graphs, of pending tokens, of hidden states on their way to the
    log, and of the weights that a hot swap has on the device.

    Published versions wait in host memory, and so do the embedding and head for the sidecar.
    """
    target = checkpoint.read_config(args.model_path, "model")
    shape = {} if target is None else checkpoint.text_part(target)
    total = 0
    if len(config.pool) > 1:
        # Catching up joins the blocks of pending tokens, which takes their size once more.
        total += 2 * config.pending_memory_mb * 2**20 + _graphs(config, args, shape)
    if args.attention_backend == "triton":
        total += _verified_rows(config, args, shape)
    hidden_size = shape.get("hidden_size")
    if config.store is not None and isinstance(hidden_size, int):
        total += _swapped(hidden_size, shape)
        if config.harvests:
            total += PENDING_BYTES + _prefill(config, args, 4 * hidden_size)
    return total


def sidecar_bytes(sizes: ModelSizes) -> int:
    """Return about what a sidecar takes of its device to train an EAGLE-3 drafter for a target: the
    drafter, and in float32 the target's embedding and the heads of both."""
    frozen = sizes.hidden * (sizes.vocab + 2 * sizes.draft_vocab)
    trained = sizes.draft_weights - sizes.hidden * sizes.draft_vocab
    return 4 * (SIDECAR_COPIES * trained + frozen) + int(SIDECAR_GB * 1e9)


def _prefill(config: Config, args: Arguments, feature_size: int) -> int:
    """Return the bytes of the hidden states that the log takes of a prefill, in bfloat16: three
    layers and the last one, of no more tokens than half of the log holds."""
    chunk = args.chunked_prefill_size or 0
    tokens = chunk if chunk > 0 else PREFILL
    return min(tokens * feature_size * 2, log_bytes(config.harvest_gb, feature_size) // 2)


def _swapped(hidden_size: int, shape: dict[str, object]) -> int:
    """Return the bytes of a drafter's largest matrix in bfloat16: a hot swap has one at a time."""
    return 2 * hidden_size * max(_size(shape, "intermediate_size"), 3 * hidden_size)


def _verified_rows(config: Config, args: Arguments, shape: Mapping[str, object]) -> int:
    """Return the bytes of the KV slots that verified rows see, and of the decode kernel's partial
    results for each row (`engine.verify_attention`), in the largest batch of the widest strategy.
    """
    of_sglang = args.speculative_num_draft_tokens or 1
    widest = max((strategy.num_draft_tokens for strategy in config.pool), default=of_sglang)
    rows = widest * (args.max_running_requests or BATCH_SIZES[-1])
    context = args.context_length or _size(shape, "max_position_embeddings")
    return rows * (context * SLOT_BYTES + KV_SPLITS * 4 * _size(shape, "hidden_size"))


def _size(shape: Mapping[str, object], name: str) -> int:
    size = shape.get(name)
    return size if isinstance(size, int) else 0


def _graphs(config: Config, args: Arguments, shape: dict[str, object]) -> int:
    """Return the bytes of the graphs as planned; 0 for a model that cannot be planned."""
    most = args.max_running_requests or BATCH_SIZES[-1]
    if args.context_length is not None:
        shape = shape | {"max_position_embeddings": args.context_length}
    try:
        plan = plan_for_model(
            config.pool,
            shape,
            batch_sizes=sorted({min(size, most) for size in BATCH_SIZES}),
            max_batch=config.max_batch,
            budget_gb=config.graph_memory_gb,
        )
    except ConfigError:
        return 0
    return plan.bytes
