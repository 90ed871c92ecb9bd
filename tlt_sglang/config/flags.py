"""The `--tlt-*` flags: generated from the settings, and read back into a configuration."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tlt_sglang.config import sources
from tlt_sglang.config.command_line import FlagGroup
from tlt_sglang.config.kinds import SWITCH
from tlt_sglang.config.setting import Setting, as_word
from tlt_sglang.config.settings import SETTINGS, VARIABLE, Config


def add_flags(group: FlagGroup, settings: Iterable[Setting]) -> None:
    """Add a flag for each setting; None stands for a flag that is not used."""
    for setting in settings:
        add_flag(group, setting)


def add_flag(group: FlagGroup, setting: Setting, default: str | None = None) -> None:
    """Add the flag of one setting, in a command where its `default` may be another one."""
    text = setting.flag_help if default is None else f"{setting.help} (default: {default})"
    text = text.replace("%", "%%")
    if setting.kind is SWITCH:
        group.add_argument(setting.flag, action="store_const", const=True, help=text)
        return
    group.add_argument(
        setting.flag,
        type=setting.kind.parse,
        default=default,
        choices=setting.kind.choices or None,
        metavar=setting.kind.metavar,
        help=text,
    )


def add_config_flag(group: FlagGroup, effect: str = "") -> None:
    """Add the flag that names a configuration file, with its `effect` besides being read."""
    group.add_argument(
        "--tlt-config",
        metavar="FILE",
        help=f"TOML file with settings{effect} (default: the environment variable {VARIABLE})",
    )


def base_config(args: argparse.Namespace) -> Config | None:
    """Return the configuration of `--tlt-config` or of the environment; None without one."""
    if args.tlt_config is not None:
        return sources.from_file(Path(args.tlt_config))
    return sources.from_environment()


def flag_values(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings whose flags are used; raises ConfigError for a value out of range."""
    words = {name: getattr(args, f"tlt_{name}", None) for name in SETTINGS}
    return {name: SETTINGS[name].check(word) for name, word in words.items() if word is not None}


def with_flags(config: Config, values: dict[str, object]) -> Config:
    """Return `config` with the values of flags, which override it; raises ConfigError."""
    fields: dict[str, Any] = values
    changed = dataclasses.replace(config, **fields)
    sources.check_combination(changed, "The command line")
    return changed


def to_flags(config: Config, settings: Iterable[Setting]) -> list[str]:
    """Return the words that give another process those of `settings` that differ from defaults."""
    words: list[str] = []
    for setting in settings:
        value = getattr(config, setting.name)
        if value != setting.default:
            words += [setting.flag] if setting.kind is SWITCH else [setting.flag, as_word(value)]
    return words
