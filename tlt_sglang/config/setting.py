"""The description of a setting: the kind of its values, its default, its help, and who reads it.

A setting is written once, as a field of `settings.Config`. The flags and their help (`flags`), the
check of a file (`sources`) and docs/configuration.md (`page`) are generated from it. Needs the
standard library alone: `tlt check` runs where nothing else is installed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from tlt_sglang.config.groups import Group, Program
from tlt_sglang.config.kinds import Kind
from tlt_sglang.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One setting, as its field in `settings.Config` describes it."""

    name: str
    default: object
    kind: Kind
    help: str
    default_text: str
    """The default in words."""
    group: Group
    used_by: tuple[Program, ...]

    @property
    def flag(self) -> str:
        """The setting's flag, which is spelled as the setting."""
        return "--tlt-" + self.name.replace("_", "-")

    @property
    def flag_help(self) -> str:
        """The flag's help: a phrase that stands alone, with the default."""
        return f"{self.help} (default: {self.default_text})"

    def check(self, value: object, source: str | None = None) -> object:
        """Return `value` as the configuration holds it.

        Raises ConfigError for a value that does not fit; `source` names the file it comes from,
        None the command line.
        """
        try:
            return self.kind.read(value)
        except ValueError:
            remedy = f"{self.kind.remedy}."
        if source is None:
            raise ConfigError(f"{self.flag} {as_word(value) or repr('')} is not valid; {remedy}")
        raise ConfigError(f"{source} gives {value!r} as {self.name}; {remedy}")


def setting(
    default: T,
    kind: Kind,
    help: str,
    group: Group,
    *,
    default_text: str | None = None,
    used_by: tuple[Program, ...] | None = None,
) -> T:
    """Return the field of a configuration that describes one setting."""
    if default_text is None:
        default_text = as_word(default)
    metadata = {
        "kind": kind,
        "help": help,
        "default_text": default_text,
        "group": group,
        "used_by": used_by or group.used_by,
    }
    return dataclasses.field(default=default, metadata=metadata)


def as_word(value: object) -> str:
    """Return a value as it is written on the command line; "none" and "off" for the unset."""
    if value is None or value is False:
        return "off" if value is False else "none"
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
