"""SGLang's arguments as a dataclass, which they were in older versions.

Stacks look at `dataclasses.fields(ServerArgs)` before they start an engine (verl, slime, miles,
UniRL). Runs in the process that starts SGLang.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any


def dataclass_fields(record: Any) -> Mapping[str, dataclasses.Field[Any]]:
    """Return the fields of a record of msgspec's, or of a dataclass, as `dataclasses` keeps them.

    Names, types, defaults and their order are the record's.
    """
    import msgspec

    if dataclasses.is_dataclass(record):
        own: Mapping[str, dataclasses.Field[Any]] = record.__dataclass_fields__
        return own
    rows = [(one.name, one.type, _field(one)) for one in msgspec.structs.fields(record)]
    made: Any = dataclasses.make_dataclass(record.__name__, rows, kw_only=True)
    fields: Mapping[str, dataclasses.Field[Any]] = made.__dataclass_fields__
    return fields


def _field(one: Any) -> Any:
    """Return the dataclass field with the default of a `FieldInfo`."""
    import msgspec

    if one.default_factory is not msgspec.NODEFAULT:
        return dataclasses.field(default_factory=one.default_factory)
    if one.default is msgspec.NODEFAULT:
        return dataclasses.field()
    if type(one.default).__hash__ is None:  # which a dataclass refuses as a default
        return dataclasses.field(default_factory=functools.partial(copy.copy, one.default))
    return dataclasses.field(default=one.default)
