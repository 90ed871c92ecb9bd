"""The errors that TLT raises at its borders; each message says what is wrong and what to do.

Used in every process; imports nothing of this package.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

EXIT_REPORTED = os.EX_CONFIG
"""The exit status of an engine process that has printed on stderr why it ends."""


class TltError(Exception):
    """The base of all errors of TLT."""


class PatchError(TltError):
    """A patch of SGLang cannot be applied, or is not in force."""


class ConfigError(TltError):
    """A flag, a setting or a name is not valid."""


class FlagError(ConfigError):
    """A flag does not exist, lacks its value, or has a value that cannot be parsed."""


class BadRequest(TltError, ValueError):
    """A request that the model or the engine cannot serve; SGLang answers it with status 400."""


class EnvironmentProblem(TltError):
    """The machine or the installation lacks something."""


def end_process(error: object) -> NoReturn:
    """Print one sentence and end this process of SGLang, which would log or lose an exception."""
    print(f"tlt-sglang: {error}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_REPORTED) from None
