"""Who else patches what TLT patches: another SGLang plugin, or code that ran before.

Looks at loaded modules and changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, ModuleType

from tlt_sglang.patching.patch import Patch, unwrapped
from tlt_sglang.patching.source import Definition
from tlt_sglang.patching.targets import MISSING, resolve

_HOOKS = "sglang.srt.plugins.hook_registry"


def hook_conflicts(patches: Iterable[Patch]) -> Iterator[str]:
    """Yield a sentence for each target that another SGLang plugin hooks.

    A hook that is registered after TLT replaces the patched object, which `verify` detects.
    """
    registry = getattr(sys.modules.get(_HOOKS), "HookRegistry", None)
    for patch in patches:
        hooks = getattr(registry, "_hooks", {}).get(patch.target.replace(":", "."))
        if hooks:
            name = getattr(hooks[0][-1], "plugin_name", "without a name")
            yield _conflict(patch, f"the SGLang plugin {name}")


def target_conflicts(patches: Iterable[Patch], expected: Mapping[str, Definition]) -> list[str]:
    """Return a sentence for each target in a loaded module that other code has patched.

    `expected` has the definition of each target in the source.
    """
    owners = [(patch, _owner(patch, expected[patch.target])) for patch in patches]
    return [_conflict(patch, owner) for patch, owner in owners if owner]


def _conflict(patch: Patch, owner: str) -> str:
    return f"{patch.target} is already patched by other code ({owner}); disable one of the two."


def _owner(patch: Patch, definition: Definition) -> str:
    """Return who has patched the target before TLT; empty if it is what the source defines."""
    module = sys.modules[patch.module]
    _, _, raw = resolve(module, patch)
    if raw is MISSING:
        return "it is missing from the loaded module"
    live = unwrapped(raw)
    own = True
    if definition.kinds == {"import"}:
        own = _is_imported(live, module, definition)
    elif not definition.decorated and definition.kinds == {"function"}:
        own = _is_written_in(live, module, definition)
    elif not definition.decorated and definition.kinds == {"class"}:
        own = isinstance(live, type) and live.__module__ == module.__name__
        own = own and live.__qualname__ == patch.qualname
    if own:
        return ""
    globals_ = getattr(live, "__globals__", {})
    return str(globals_.get("__name__") or getattr(live, "__module__", type(live).__module__))


def _is_written_in(live: object, module: ModuleType, definition: Definition) -> bool:
    if not isinstance(live, FunctionType) or hasattr(live, "__wrapped__"):
        return False
    files = (live.__code__.co_filename, module.__file__ or "")
    same_file = len({os.path.realpath(file) for file in files}) == 1
    return same_file and live.__code__.co_firstlineno in definition.lines


def _is_imported(live: object, module: ModuleType, definition: Definition) -> bool:
    """Return whether it is what the import would bind now; True where that is unknown."""
    for origin, name in definition.origins:
        origin = importlib.util.resolve_name(origin, module.__package__)
        source = sys.modules.get(origin)
        if not name and (source is None or source is live):
            return True
        value = vars(source).get(name, MISSING) if source is not None else MISSING
        if name and (
            value is MISSING or value is live or sys.modules.get(f"{origin}.{name}") is live
        ):
            return True
    return False
