"""How much KV cache a CPU machine can hold. Pure arithmetic on a model's `config.json`."""

from __future__ import annotations

from typing import Any

from tlt_sglang.errors import ConfigError

SHARE = 0.25
"""Share of the available memory that the KV pool takes unless told otherwise."""
MOST_TOKENS = 32_768
"""And no more tokens than this: SGLang touches the whole pool at start, seconds per 100,000."""


def bytes_per_token(model: dict[str, Any]) -> int:
    """KV bytes of one token in float32: keys and values of every layer."""
    layers = int(model["num_hidden_layers"])
    heads = int(model.get("num_key_value_heads") or model["num_attention_heads"])
    size = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    return layers * 2 * heads * int(size) * 4


def pool_tokens(model: dict[str, Any], available: int, wanted: int | None) -> int:
    """Tokens the KV pool holds, given `available` bytes of memory.

    Raises ConfigError if `wanted` tokens do not fit.
    """
    each = bytes_per_token(model)
    if wanted is None:
        return max(1, min(MOST_TOKENS, int(available * SHARE) // each))
    if wanted * each > available:
        raise ConfigError(
            f"A KV cache of {wanted} tokens needs {wanted * each / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB of memory are free; lower --max-total-tokens to at most "
            f"{available // each}."
        )
    return wanted
