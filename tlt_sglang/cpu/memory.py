"""How much KV cache a CPU machine can hold. Pure arithmetic on a model's `config.json`."""

from __future__ import annotations

from typing import Any

from tlt_sglang.errors import ConfigError

SHARE = 0.25
"""Share of the available memory that the KV pool takes unless told otherwise."""
MOST_TOKENS = 16_384
"""And no more tokens than this: SGLang touches the whole pool at start, a second per 10,000."""

SHAPE = {"num_hidden_layers", "num_attention_heads", "hidden_size"}
"""What `config.json` has to hold; where it names them otherwise, SGLang sizes the pool."""


def bytes_per_token(model: dict[str, Any]) -> int:
    """KV bytes of one token in float32: keys and values of every layer.

    Raises ConfigError for numbers that cannot be.
    """
    layers, queries = _count(model, "num_hidden_layers"), _count(model, "num_attention_heads")
    heads = _count(model, "num_key_value_heads", queries)
    size = _count(model, "head_dim", _count(model, "hidden_size") // queries)
    return layers * 2 * heads * size * 4


def _count(model: dict[str, Any], name: str, otherwise: int | None = None) -> int:
    value = model.get(name)
    if value is None and otherwise is not None:
        value = otherwise
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"config.json of the model gives {name} {value!r}; it has to be a number from 1 on."
        )
    return value


def check_weights(size: int, available: int) -> None:
    """Raise ConfigError if weights of `size` bytes, in float32, exceed `available` ones."""
    if size > available:
        raise ConfigError(
            f"The model's weights need {size / 2**30:.1f} GiB in float32 and "
            f"{available / 2**30:.1f} GiB of memory are free; use a smaller model, or a GPU."
        )


def pool_tokens(model: dict[str, Any], available: int, wanted: int | None) -> int:
    """Tokens the KV pool holds, given `available` bytes of memory.

    Raises ConfigError if `wanted` tokens do not fit.
    """
    each = bytes_per_token(model)
    if wanted is None:
        return max(1, min(MOST_TOKENS, int(available * SHARE) // each))
    if wanted < 1:
        raise ConfigError(f"--max-total-tokens {wanted} leaves no room; give at least 1.")
    if wanted * each > available:
        raise ConfigError(
            f"A KV cache of {wanted} tokens needs {wanted * each / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB of memory are free; lower --max-total-tokens to at most "
            f"{available // each}."
        )
    return wanted
