"""SGLang's arguments on CUDA: what a pool of strategies and released memory need.

Pure, except that it reads `config.json` files; runs wherever `ServerArgs` is resolved.
"""

from __future__ import annotations

from tlt_sglang.config.server_args import Arguments, Fields
from tlt_sglang.config.settings import Config
from tlt_sglang.models import drafter_checkpoint as checkpoint
from tlt_sglang.strategy.strategies import Strategy

MAX_RUNNING_REQUESTS = 256
"""Default of a pool with plain decoding; SGLang's own for any speculative algorithm is 48, which
holds back plain decoding of large batches."""


_BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


def _may_choose(args: Arguments) -> bool:
    """Return whether the attention backend is left to TLT, for a target that Triton suits.

    With trees SGLang would choose FlashInfer, with which each step waits until the host knows the
    lengths, so that no step is prepared while another one runs.
    """
    if any(getattr(args, name, None) is not None for name in _BACKENDS):
        return False
    target = checkpoint.read_config(args.model_path, "model")
    return target is not None and "kv_lora_rank" not in checkpoint.text_part(target)


def cuda_fields(config: Config, args: Arguments) -> Fields:
    """Return the fields that suit several strategies, and drafters whose memory is released."""
    fields: Fields = {}
    pool = config.pool
    if len(pool) > 1 and Strategy("off") in pool and args.max_running_requests is None:
        fields["max_running_requests"] = MAX_RUNNING_REQUESTS
    if len(pool) > 1 and any(strategy.topk > 1 for strategy in pool) and _may_choose(args):
        fields["attention_backend"] = "triton"
    drafts = config.strategy is None or any(strategy.num_steps for strategy in pool)
    if args.enable_memory_saver and drafts and args.speculative_draft_model_path is not None:
        # Nobody sends the drafter's weights again after a release.
        fields["enable_draft_weights_cpu_backup"] = True
    return fields
