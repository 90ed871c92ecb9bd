"""Checks of a drafter's checkpoint: its kind, and whether it fits its target.

Reads `config.json` files only: no torch, no SGLang. Runs in the launcher and in the process that
resolves SGLang's arguments, before any weight is loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import DrafterName

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def read_config(path: str, what: str) -> dict[str, Any] | None:
    """Return `config.json` of a local checkpoint, or None if `path` is a hub id.

    `what` names the checkpoint in errors ("model", "drafter"). Raises ConfigError.
    """
    if not path.strip():
        raise ConfigError(f"The path of the {what} is empty; use a folder or a hub id.")
    try:
        folder = Path(path).expanduser()
        exists = folder.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"The {what} {path!r} cannot be read ({reason}); use another folder."
        ) from error
    if not exists:
        if not _HUB_ID.fullmatch(path):
            raise ConfigError(f"The {what} {path!r} does not exist; use a folder or a hub id.")
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The {what} folder {path!r} has no readable config.json; use a Hugging Face "
            "checkpoint folder."
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"config.json of the {what} {path!r} is not a JSON object; repair the file."
        )
    return config


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` overridden by the fields of its language model, if it has several."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def require_weights(path: str) -> None:
    """Raise ConfigError for a local checkpoint without weights, such as an unfinished download."""
    folder = Path(path).expanduser()
    if not any(file.suffix in _WEIGHTS for file in folder.iterdir()):
        raise ConfigError(
            f"The model folder {path!r} has no weights ({', '.join(_WEIGHTS)}); download them."
        )


def float32_bytes(path: str, config: dict[str, Any]) -> int:
    """Return the bytes of a local checkpoint's weights in float32; 0 if there are no files."""
    folder = Path(path).expanduser()
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    half = str(config.get("dtype") or config.get("torch_dtype")) in ("float16", "bfloat16")
    return sum(file.stat().st_size for file in files) * (2 if half else 1)


def drafter_kind(config: dict[str, Any], path: str) -> DrafterName:
    """Return `eagle` or `eagle3`, by the architectures in the checkpoint. Raises ConfigError."""
    value = config.get("architectures")
    names = [str(name) for name in value] if isinstance(value, list) else []
    if any(name.lower().endswith("eagle3") for name in names):
        return "eagle3"
    if any("eagle" in name.lower() or "nextn" in name.lower() for name in names):
        return "eagle"
    raise ConfigError(
        f"{path!r} is not a drafter: its architectures are {names}; use an EAGLE or EAGLE-3 "
        "checkpoint."
    )


def check_fits(target: dict[str, Any], drafter: dict[str, Any], path: str) -> None:
    """Raise ConfigError unless `drafter` was made for a target shaped like `target`.

    The drafter reads the target's hidden states and shares its token ids, so hidden size and
    vocabulary must agree. (An EAGLE-3 drafter may be narrower than its target when it says so with
    `target_hidden_size`.)
    """
    kind = drafter_kind(drafter, path)
    target = text_part(target)
    expected = {"hidden size": target.get("hidden_size"), "vocabulary": target.get("vocab_size")}
    hidden_size = drafter.get("hidden_size")
    if kind == "eagle3":
        hidden_size = drafter.get("target_hidden_size") or hidden_size
    actual = {"hidden size": hidden_size, "vocabulary": drafter.get("vocab_size")}
    for name, value in expected.items():
        if value is not None and actual[name] != value:
            raise ConfigError(
                f"The drafter {path!r} is for another target: its {name} is {actual[name]}, the "
                f"model's is {value}; use a drafter for this model."
            )
    if kind == "eagle" and drafter.get("tie_word_embeddings"):
        raise ConfigError(
            f"The drafter {path!r} has tie_word_embeddings true in config.json, with which SGLang "
            "cannot share the target's head; set it to false."
        )
