"""Where a patch's target is bound: in its own module, and in those that imported it.

Looks at loaded modules and changes nothing.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

from tlt_sglang.patching.patch import Patch
from tlt_sglang.patching.source import Definition

MISSING = object()
"""The value of a target that does not exist."""


def resolve(module: ModuleType, patch: Patch) -> tuple[Any, str, Any]:
    """Return the holder of the target, its name there, and its raw value or MISSING.

    The holder is the module's own class also where a stack has put a subclass in its place.
    """
    holder: Any = module
    *owners, name = patch.qualname.split(".")
    for depth, owner in enumerate(owners, start=1):
        holder = _own_class(vars(holder).get(owner), module, ".".join(owners[:depth]))
        if not isinstance(holder, type):
            return holder, name, MISSING
    return holder, name, vars(holder).get(name, MISSING)


def _own_class(value: object, module: ModuleType, qualname: str) -> object:
    """Return the class of `module` that `value` is or inherits from, else `value`."""
    for base in value.__mro__ if isinstance(value, type) else ():
        if (base.__module__, base.__qualname__) == (module.__name__, qualname):
            return base
    return value


def is_own(raw: object, module: ModuleType, definition: Definition) -> bool:
    """Return whether the module itself defines `raw`, which others may have imported."""
    if definition.kinds <= {"function", "class"}:
        return callable(raw)
    return isinstance(raw, (FunctionType, type)) and raw.__module__ == module.__name__


def bindings(value: object, module: ModuleType) -> list[tuple[ModuleType, str]]:
    """Return where other loaded modules of the package bind this very object."""
    package = module.__name__.split(".")[0]
    return [
        (other, bound)
        for name, other in list(sys.modules.items())
        if name.split(".")[0] == package and other is not module and isinstance(other, ModuleType)
        for bound, held in list(vars(other).items())
        if held is value
    ]
