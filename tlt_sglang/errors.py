"""The errors TLT raises at its borders; each message says what to do.

Used in every process; imports nothing of ours.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

SPOKEN = os.EX_CONFIG
"""Exit status of an engine process that has said on stderr why it ends."""


class TltError(Exception):
    """The base of all of them."""


class PatchError(TltError):
    """A patch of SGLang cannot be applied, or is not in."""


class ConfigError(TltError):
    """A flag, a setting or a name that cannot be right."""


class FlagError(ConfigError):
    """A flag that does not exist, lacks its value, or has one that cannot be read."""


class EnvironmentProblem(TltError):
    """The machine or the installation lacks something."""


def end_process(error: object) -> NoReturn:
    """End this process of SGLang's with one sentence; an exception would be logged or lost."""
    print(f"tlt-sglang: {error}", file=sys.stderr, flush=True)
    raise SystemExit(SPOKEN) from None
