"""The table of what TLT refuses at the start: flags of SGLang, and kinds of drafters.

Flags are checked before SGLang resolves them, so that the launcher refuses at once, and again
after that: SGLang sets some by the model, or by other flags. A drafter is checked by its
config.json where that is a local file, and by the configuration that is loaded.
docs/refused.md and `tlt check` list the rows. Runs wherever a configuration is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlt_sglang.config.refusals import FeatureName, Refusal
from tlt_sglang.config.settings import Config, Device

DrafterConfig = Mapping[str, object]
"""A drafter's config.json."""

TRAINED_LAYERS = 3
"""Layers of the target whose hidden states an EAGLE-3 drafter of our trainer reads."""

EVERYWHERE: tuple[Device, ...] = ("cpu", "cuda")


def _flag(
    field: str,
    works: tuple[object, ...],
    features: tuple[FeatureName, ...],
    reason: str,
    remedy: str = "",
    devices: tuple[Device, ...] = ("cuda",),
) -> Refusal[object]:
    """Return the row of a field of `ServerArgs`, which must have one of the values `works`."""
    flag = "--" + field.replace("_", "-")

    def detect(args: object) -> str | None:
        value = getattr(args, field, works[0])  # older versions lack some
        if value in works or (isinstance(value, str) and value.upper() in works):
            return None
        shows = isinstance(value, int | float | str) and value is not True
        return f"{flag} {value}" if shows else flag

    first = works[0]
    default = f"leave {flag} out" if first in (None, False, "null") else f"use {flag} {first}"
    others = ", ".join(f"`{value}`" for value in works if value not in (None, False))
    title = f"`{flag}`" + (f" other than {others}" if others else "")
    return Refusal(title, detect, features, reason, remedy or default, devices)


_LOSSY = "it accepts drafts that the target would not have sampled"
_DRAWN = "tokens are sampled by the noise of a seed, which gives the same answer with any strategy"
_GROUPS = "each group of ranks would choose and log for its own batch"
_LORA = "the CUDA graphs of one strategy would take the LoRA buffers of another"
_NO_EAGLE = "SGLang then runs a worker of its own, which TLT does not know"

FLAGS: tuple[Refusal[object], ...] = (
    _flag("speculative_accept_threshold_single", (1,), ("any",), _LOSSY, devices=EVERYWHERE),
    _flag("speculative_accept_threshold_acc", (1,), ("any",), _LOSSY, devices=EVERYWHERE),
    _flag("speculative_use_rejection_sampling", (False,), ("any",), _DRAWN, devices=EVERYWHERE),
    _flag("speculative_use_block_verification", (False,), ("any",), _DRAWN, devices=EVERYWHERE),
    _flag(
        "tokenizer_worker_num",
        (1,),
        ("timeout",),
        "a worker that a client does not call would take it for silent",
        devices=EVERYWHERE,
    ),
    _flag("attn_dp_size", (1,), ("pool", "store"), _GROUPS),
    _flag("enable_dp_attention", (False,), ("pool", "store"), _GROUPS),
    _flag(
        "pp_size", (1,), ("pool", "store", "sampling"), "only the last stage would have a drafter"
    ),
    _flag(
        "enable_two_batch_overlap",
        (False,),
        ("pool",),
        "a change of strategy would replace the attention backend that splits the batch",
    ),
    _flag(
        "enable_pdmux",
        (False,),
        ("pool",),
        "a change of strategy would not reach the attention backends of its streams",
    ),
    _flag(
        "rl_on_policy_target",
        (None,),
        ("sampling",),
        "SGLang then rounds log-probabilities before it samples, and verification would not",
    ),
    _flag("enable_multi_layer_eagle", (False,), ("pool", "store", "sampling"), _NO_EAGLE),
    _flag(
        "speculative_algorithm",
        (None, "EAGLE", "EAGLE3", "NEXTN"),
        ("pool", "store", "sampling"),
        _NO_EAGLE,
        "use an EAGLE or EAGLE-3 drafter",
    ),
    _flag("enable_lora", (None, False), ("pool",), _LORA),
    _flag("lora_paths", (None,), ("pool",), _LORA),
    _flag(
        "speculative_draft_model_quantization",
        (None, "unquant"),
        ("store",),
        "published versions are not quantised, and a drafter takes --quantization from the target",
        "use --speculative-draft-model-quantization unquant",
    ),
    _flag(
        "enable_mixed_chunk",
        (False,),
        ("deferring",),
        "requests that decode beside a prompt would leave gaps in the drafter's KV cache",
    ),
    _flag(
        "disaggregation_mode",
        ("null",),
        ("pool", "store", "sampling"),
        "neither server has all that a request leaves for its drafter",
    ),
)
"""Rows of `ServerArgs`, before and after SGLang resolves it; the launcher has the same fields."""


def _architectures(config: DrafterConfig) -> list[str]:
    value = config.get("architectures")
    return [str(name) for name in value] if isinstance(value, list) else []


def _prediction_heads(config: DrafterConfig) -> str | None:
    names = _architectures(config)
    if not names or any("eagle" in name.lower() for name in names):
        return None
    return f"The drafter {names[0]}"


def _other_layers(config: DrafterConfig) -> str | None:
    if not any(name.lower().endswith("eagle3") for name in _architectures(config)):
        return None
    count = _layers(config)
    if count == TRAINED_LAYERS:
        return None
    return f"A drafter that reads {count} layer{'' if count == 1 else 's'} of its target"


def _layers(config: DrafterConfig) -> int:
    """Return how many layers of the target an EAGLE-3 drafter reads, as SGLang counts them."""
    inner = config.get("eagle_config")
    inner = inner if isinstance(inner, dict) else {}
    if not inner.get("use_aux_hidden_state", True):
        return 1
    count = config.get("num_aux_hidden_states")
    if isinstance(count, int):
        return count
    name = "eagle_aux_hidden_state_layer_ids"
    layers = inner.get(name) or config.get(name)
    return len(layers) if isinstance(layers, list | tuple) and layers else TRAINED_LAYERS


def _mrope(config: DrafterConfig) -> str | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    multimodal = isinstance(rope, dict) and "mrope_section" in rope
    return "A drafter with multimodal positions (mrope_section)" if multimodal else None


def _quantised(config: DrafterConfig) -> str | None:
    return "A quantised drafter" if config.get("quantization_config") else None


_OTHER_DRAFTER = "use another --speculative-draft-model-path"

DRAFTERS: tuple[Refusal[DrafterConfig], ...] = (
    Refusal(
        "a drafter of multi-token prediction heads",
        _prediction_heads,
        ("deferring", "store"),
        "prediction heads can neither wait for other strategies nor be trained",
        "use an EAGLE or EAGLE-3 drafter",
    ),
    Refusal(
        "an EAGLE-3 drafter that does not read three layers",
        _other_layers,
        ("store",),
        "hidden states are logged and trained for three layers",
        _OTHER_DRAFTER,
        EVERYWHERE,
    ),
    Refusal(
        "a drafter with multimodal positions",
        _mrope,
        ("deferring",),
        "positions of images are not kept while the drafter waits for other strategies",
        _OTHER_DRAFTER,
    ),
    Refusal(
        "a quantised drafter",
        _quantised,
        ("store",),
        "published versions are not quantised",
        _OTHER_DRAFTER,
        EVERYWHERE,
    ),
)
"""Rows of a drafter's configuration."""

ROWS: tuple[Refusal[Any], ...] = (*FLAGS, *DRAFTERS)
"""All rows, in the order of documentation."""


def refuse_flags(config: Config, args: object, device: Device) -> None:
    """Raise ConfigError if SGLang's arguments exclude a feature of TLT that is on."""
    for row in FLAGS:
        row.check(config, args, device)


def exclude(feature: FeatureName, args: object, device: Device) -> bool:
    """Return whether SGLang's arguments exclude a feature of TLT."""
    rows = (row for row in FLAGS if feature in row.features and device in row.devices)
    return any(row.detect(args) is not None for row in rows)


def refuse_drafter(config: Config, drafter: DrafterConfig, device: Device) -> None:
    """Raise ConfigError if a drafter excludes a feature of TLT that is on."""
    for row in DRAFTERS:
        row.check(config, drafter, device)


def by_feature(device: Device) -> dict[str, list[str]]:
    """Return the titles of what is refused on `device`, by the title of the feature."""
    titles: dict[str, list[str]] = {}
    for row in ROWS:
        for feature in row.excludes if device in row.devices else ():
            titles.setdefault(feature, []).append(row.title)
    return titles
