"""Where a configuration comes from: the environment, a TOML file, or a parsed mapping.

SGLang starts its engine processes itself and its `ServerArgs` takes no foreign fields, so the
configuration travels in the environment: `TLT_CONFIG` names a TOML file (what an RL stack sets), or
holds the same settings as inline JSON (what our launcher sets). Where it is unset, TLT is off.
Runs in every process; imports nothing of SGLang.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlt_sglang.config.settings import SETTINGS, VARIABLE, Config, Device
from tlt_sglang.errors import ConfigError


def from_environment(environ: Mapping[str, str] = os.environ) -> Config | None:
    """Return the configuration of this process, or None where TLT is off.

    Raises ConfigError for a file that cannot be read, an unknown setting, and a bad value.
    """
    value = environ.get(VARIABLE, "").strip()
    if not value:
        return None
    if value.startswith("{"):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{VARIABLE} holds no valid JSON: {error}.") from error
        return from_fields(fields, f"The JSON in {VARIABLE}")
    return from_file(Path(value))


def from_file(path: Path) -> Config:
    """Return the configuration in a TOML file; raises ConfigError."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        fields = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"The TLT configuration {path} is not valid TOML: {error}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"The TLT configuration {path} cannot be read ({reason}); give {VARIABLE} or "
            "--tlt-config the path of a TOML file."
        ) from error
    return from_fields(fields, str(path))


def from_fields(fields: object, source: str) -> Config:
    """Return the configuration from a parsed mapping; `source` names it in errors."""
    if not isinstance(fields, dict):
        raise ConfigError(f"{source} must hold a table of settings, not a {type(fields).__name__}.")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in SETTINGS:
            raise ConfigError(
                f"{source} has the unknown setting {name!r}; known ones: {', '.join(SETTINGS)}."
            )
        # The inline JSON of a None is null, which stands for the default.
        default = SETTINGS[name].default
        unset = value is None and default is None
        values[name] = None if unset else SETTINGS[name].check(value, source)
    config = Config(**values)
    check_combination(config, source)
    return config


def check_combination(config: Config, source: str) -> None:
    """Raise ConfigError for settings that need others."""
    if config.grow and config.store is None:
        raise ConfigError(f"{source} asks to grow a drafter, which needs a store to grow in.")
    if config.log_requests and config.events is None:
        raise ConfigError(f"{source} asks to log requests, which needs events, the file for them.")


def engine_device(environ: Mapping[str, str] = os.environ) -> Device:
    """Return which of SGLang's engines this process runs; the CPU engine has a variable."""
    return "cpu" if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" else "cuda"
