"""The size of the KV cache on a CPU machine: pure arithmetic on a model's `config.json`.

Runs in the process that resolves SGLang's arguments. Measures no memory itself.
"""

from __future__ import annotations

from typing import Any

from tlt_sglang.errors import ConfigError

SHARE = 0.25
"""The share of the available memory that the KV pool takes by default."""
MAX_TOKENS = 16_384
"""The largest default pool: SGLang touches all of it at start, a second per 10,000 tokens."""

SHAPE = {"num_hidden_layers", "num_attention_heads", "hidden_size"}
"""The fields that `config.json` must have; without them SGLang sizes the pool."""


def bytes_per_token(model: dict[str, Any]) -> int:
    """Return the KV bytes of one token in float32: keys and values of every layer.

    Raises ConfigError for numbers that are not valid.
    """
    layers, queries = _count(model, "num_hidden_layers"), _count(model, "num_attention_heads")
    heads = _count(model, "num_key_value_heads", queries)
    size = _count(model, "head_dim", _count(model, "hidden_size") // queries)
    return layers * 2 * heads * size * 4


def _count(model: dict[str, Any], name: str, default: int | None = None) -> int:
    value = model.get(name)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{name} in the model's config.json is {value!r}; it must be an integer above 0."
        )
    return value


def check_weights(size: int, available: int) -> None:
    """Raise ConfigError if weights of `size` bytes in float32 exceed `available` bytes."""
    if size > available:
        raise ConfigError(
            f"The model's weights need {size / 2**30:.1f} GiB in float32 and "
            f"{available / 2**30:.1f} GiB of memory are free; use a smaller model, or a GPU."
        )


def pool_tokens(model: dict[str, Any], available: int, requested: int | None) -> int:
    """Return the number of tokens of the KV pool, for `available` bytes of memory.

    Raises ConfigError if `requested` tokens, the user's choice, do not fit.
    """
    each = bytes_per_token(model)
    if requested is None:
        return max(1, min(MAX_TOKENS, int(available * SHARE) // each))
    if requested < 1:
        raise ConfigError(f"--max-total-tokens {requested} is too small; use at least 1.")
    if requested * each > available:
        raise ConfigError(
            f"A KV cache of {requested} tokens needs {requested * each / 2**30:.1f} GiB and "
            f"{available / 2**30:.1f} GiB of memory are free; lower --max-total-tokens to at most "
            f"{available // each}."
        )
    return requested
