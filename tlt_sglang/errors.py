"""The errors TLT raises at its borders; each message says what to do.

Used in every process; imports nothing.
"""


class TltError(Exception):
    """The base of all of them."""


class PatchError(TltError):
    """A patch of SGLang cannot be applied, or is not in."""


class ConfigError(TltError):
    """A flag, a setting or a name that cannot be right."""


class EnvironmentProblem(TltError):
    """The machine or the installation lacks something."""
