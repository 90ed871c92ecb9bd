"""Device memory that TLT takes beside weights, KV cache and the graphs of one strategy.

SGLang sizes its KV cache by what it expects to take itself. Pure, except that it reads
`config.json` files; runs where `ServerArgs` is resolved. A sidecar on the same device is not
counted: it starts and stops.
"""

from __future__ import annotations

from tlt_sglang.config.server_args import Arguments
from tlt_sglang.config.settings import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import BATCH_SIZES, plan_for_model
from tlt_sglang.models import drafter_checkpoint as checkpoint

PREFILL = 8192
"""Tokens of a prefill where SGLang does not say."""
FEATURE_COPIES = 2
"""Copies of a prefill's hidden states: joined for the log, and on their way to the host."""


def reserved_bytes(config: Config, args: Arguments) -> int:
    """Return the bytes of a pool's graphs, of pending tokens and of hidden states for the log."""
    target = checkpoint.read_config(args.model_path, "model")
    shape = {} if target is None else checkpoint.text_part(target)
    total = 0
    if len(config.pool) > 1:
        # Catching up joins the blocks of pending tokens, which takes their size once more.
        total += 2 * config.pending_memory_mb * 2**20 + _graphs(config, args, shape)
    hidden_size = shape.get("hidden_size")
    if config.harvests and isinstance(hidden_size, int):
        chunk = args.chunked_prefill_size or 0
        tokens = chunk if chunk > 0 else PREFILL
        total += FEATURE_COPIES * tokens * 4 * hidden_size * 2  # three layers and the last, bf16
    return total


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
