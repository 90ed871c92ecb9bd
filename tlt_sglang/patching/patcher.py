"""The one door to SGLang: every attribute that TLT sets on it is set here, and can be reverted.

A `Patcher` compares the patches' digests with the installed source, patches the modules that are
loaded and adds one import hook for those that are not, so nothing is imported because of TLT.

Runs in every process that loads SGLang's plugins. It defines no patch and does not decide whether
TLT is on. A function or class is also replaced where other loaded modules of the package did
`from X import Y`; a constant, or a name that a module merely imported, is replaced only in the
target's module.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from tlt_sglang.errors import PatchError
from tlt_sglang.patching.patch import Only, Patch, inspect_patches, overlaps, unwrapped
from tlt_sglang.patching.source import Definition, SourceTree

_MISSING = object()
_HOOKS = "sglang.srt.plugins.hook_registry"


class _Finder(importlib.abc.MetaPathFinder):
    """An import hook that calls `after_import` right after one of `modules` was executed.

    The other finders find and load the module.
    """

    def __init__(self, modules: Iterable[str], after_import: Callable[[ModuleType], None]) -> None:
        self._modules, self._after_import, self._busy = set(modules), after_import, set[str]()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._modules or fullname in self._busy:
            return None
        self._busy.add(fullname)
        try:
            others = [getattr(f, "find_spec", None) for f in sys.meta_path if f is not self]
            specs = (find(fullname, path, target) for find in others if find is not None)
            spec: importlib.machinery.ModuleSpec | None = next(filter(None, specs), None)
        finally:
            self._busy.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            self._after_import(module)

        # Set on the instance, so that the loader's type, and inspect.getsource, stay unchanged.
        vars(loader)["exec_module"] = exec_module
        return spec


@dataclass
class _Applied:
    """A patch in force, the object that it put in place, and how to undo it."""

    patch: Patch
    ours: object
    undo: list[Callable[[], object]] = field(default_factory=list)


class Patcher:
    """Applies patches to this process, all or none, and reverts them."""

    def __init__(
        self, patches: Iterable[Patch], device: Only, tree: SourceTree | None = None
    ) -> None:
        """Prepare the patches for `device`; "any" takes all of them.

        `tree` is the source of the installed package, which is located by default.
        """
        self._patches = tuple(patches)
        self._mine = [p for p in self._patches if device == "any" or p.only_on in ("any", device)]
        self._tree = tree
        self._finder: _Finder | None = None
        self._applied: list[_Applied] = []
        self._failed: dict[str, str] = {}
        self._expected: dict[str, Definition] = {}

    def check(self, tree: SourceTree) -> list[str]:
        """Return a sentence for each reason why the patches do not fit `tree`."""
        fits = inspect_patches(self._mine, tree)
        return [fit.problem for fit in fits if fit.problem] + list(overlaps(self._mine))

    def apply(self) -> None:
        """Patch the loaded modules now and the others when they are imported. Idempotent.

        Raises PatchError, which names every problem; then nothing is changed.
        """
        if self._finder is not None or not self._mine:
            return
        # Does everything fit?
        package = self._mine[0].module.split(".")[0]
        tree = self._tree or SourceTree.from_installed(package)
        fits = inspect_patches(self._mine, tree)
        problems = [fit.problem for fit in fits if fit.problem] + list(overlaps(self._mine))
        self._expected = {fit.patch.target: fit.definition for fit in fits if fit.definition}
        loaded = [p for p in self._mine if sys.modules.get(p.module) is not None]
        problems = problems or list(_hook_conflicts(self._mine)) or self._conflicts(loaded)
        if problems:
            versions = " or ".join(dict.fromkeys(v for p in self._mine for v in p.digests))
            raise PatchError(
                f"TLT does not fit {package} {tree.version} and patched nothing; use an unpatched "
                f"{package} {versions}, or resolve each problem: {' '.join(problems)}"
            )
        # All or none.
        self._finder = _Finder((p.module for p in self._mine), self._after_import)
        sys.meta_path.insert(0, self._finder)
        try:
            self._install(loaded)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Restore the original objects, newest change first."""
        if self._finder is not None and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder = None
        self._undo(self._applied)
        self._failed.clear()

    def verify(self) -> None:
        """Raise PatchError unless every patch is in force or waits for its module's import."""
        if self._finder is None and self._mine:
            raise PatchError("TLT's patches are not applied; check that its plugin was loaded.")
        problems = list(self._failed.values())
        for row in self.report():
            if row["state"] == "lost" and row["target"].split(":")[0] not in self._failed:
                problems.append(
                    f"The patch of {row['target']} is not in force any more; find what replaced "
                    "it, and disable that or TLT."
                )
        if problems:
            raise PatchError(" ".join(problems))

    def report(self) -> list[dict[str, str]]:
        """Return a row for each patch with its target, kind and state.

        The state is "in force", "waiting for import", "not for this device", "not applied" or
        "lost".
        """
        return [
            {"target": p.target, "kind": p.kind, "state": self._state(p)} for p in self._patches
        ]

    def _state(self, patch: Patch) -> str:
        if all(patch is not mine for mine in self._mine):
            return "not for this device"
        if self._finder is None:
            return "not applied"
        if patch.module not in sys.modules:
            return "waiting for import" if self._finder in sys.meta_path else "lost"
        live: Any = sys.modules[patch.module]
        for part in patch.qualname.split("."):
            live = inspect.getattr_static(live, part, _MISSING)
        entries = [live]
        if patch.kind == "register" and isinstance(live, (dict, list)):
            entries = live if isinstance(live, list) else [live.get(patch.key)]
        applied = next((a for a in self._applied if a.patch is patch), None)
        in_force = applied is not None and any(entry is applied.ours for entry in entries)
        return "in force" if in_force else "lost"

    def _after_import(self, module: ModuleType) -> None:
        name = module.__name__
        if self._finder is None:
            return
        # A module that is executed again has new objects, so its old records are obsolete.
        self._applied = [a for a in self._applied if a.patch.module != name]
        self._failed.pop(name, None)
        mine = [p for p in self._mine if p.module == name]
        try:
            if problems := self._conflicts(mine):
                raise PatchError(" ".join(problems))
            self._install(mine)
        except Exception as error:
            self._failed[name] = str(error)
            raise

    def _install(self, patches: list[Patch]) -> None:
        """Patch imported names last, so that they bind the patched objects of their modules."""
        before = list(self._applied)
        for patch in sorted(patches, key=lambda p: "import" in self._expected[p.target].kinds):
            try:
                self._patch(patch)
            except BaseException as error:
                self._undo([a for a in self._applied if all(a is not b for b in before)])
                if isinstance(error, PatchError) or not isinstance(error, Exception):
                    raise
                raise PatchError(
                    f"Patching {patch.target} failed ({error!r}) and was undone; correct the patch."
                ) from error

    def _patch(self, patch: Patch) -> None:
        module = sys.modules[patch.module]
        holder, name, raw = _resolve(module, patch)
        record = _Applied(patch, patch.make(raw))
        self._applied.append(record)
        if patch.kind == "register":
            _register(raw, record)
            return
        setattr(holder, name, record.ours)
        record.undo.append(functools.partial(setattr, holder, name, raw))
        if holder is module and _is_own(raw, module, self._expected[patch.target]):
            for other, bound in _bindings(raw, module):
                setattr(other, bound, record.ours)
                record.undo.append(functools.partial(setattr, other, bound, raw))
        if holder is module and _is_only_ours(record):
            record.undo.append(functools.partial(_unbind, record.ours, raw, module))

    def _undo(self, records: list[_Applied]) -> None:
        for record in reversed(records):
            for step in reversed(record.undo):
                step()
        self._applied = [a for a in self._applied if all(a is not r for r in records)]

    def _conflicts(self, patches: list[Patch]) -> list[str]:
        """Return a sentence for each target that is already patched by other code."""
        owners = [_owner(p, self._expected[p.target]) for p in patches]
        return [_conflict(p, owner) for p, owner in zip(patches, owners, strict=True) if owner]


def _resolve(module: ModuleType, patch: Patch) -> tuple[Any, str, Any]:
    """Return the holder of the target, its name there, and its raw value or _MISSING."""
    holder: Any = module
    *owners, name = patch.qualname.split(".")
    for owner in owners:
        holder = vars(holder).get(owner)
        if not isinstance(holder, type):
            return holder, name, _MISSING
    return holder, name, vars(holder).get(name, _MISSING)


def _register(container: object, record: _Applied) -> None:
    key, ours = record.patch.key, record.ours
    if isinstance(container, list) and key is None:
        container.append(ours)
        record.undo.append(functools.partial(_remove, container, ours))
    elif isinstance(container, dict) and key is not None:
        there = key in container
        undo = functools.partial(container.__setitem__, key, container.get(key))
        record.undo.append(undo if there else functools.partial(container.pop, key, None))
        container[key] = ours
    else:
        raise PatchError(
            f"{record.patch.target} is a {type(container).__name__}; use a key for a dict, and "
            "None for a list."
        )


def _remove(container: list[object], ours: object) -> None:
    """Remove the last entry that is `ours`, which is the one that was appended."""
    for index in reversed(range(len(container))):
        if container[index] is ours:
            del container[index]
            return


def _is_own(raw: object, module: ModuleType, definition: Definition) -> bool:
    """Return whether the module itself defines `raw`, which others may have imported."""
    if definition.kinds <= {"function", "class"}:
        return callable(raw)
    return isinstance(raw, (FunctionType, type)) and raw.__module__ == module.__name__


def _is_only_ours(record: _Applied) -> bool:
    """Return whether other modules can have `ours` only through the patch."""
    package = record.patch.module.split(".")[0]
    home = str(getattr(record.ours, "__module__", "builtins")).split(".")[0]
    return callable(record.ours) and (
        record.patch.kind == "wrap" or home not in (package, "builtins")
    )


def _unbind(ours: object, raw: object, module: ModuleType) -> None:
    """Restore `raw` in modules that were imported since then and bound `ours`."""
    for other, bound in _bindings(ours, module):
        setattr(other, bound, raw)


def _bindings(value: object, module: ModuleType) -> list[tuple[ModuleType, str]]:
    """Return where other loaded modules of the package bind this very object."""
    package = module.__name__.split(".")[0]
    return [
        (other, bound)
        for name, other in list(sys.modules.items())
        if name.split(".")[0] == package and other is not module and isinstance(other, ModuleType)
        for bound, held in list(vars(other).items())
        if held is value
    ]


# ---- conflicts ----------------------------------------------------------------------------


def _hook_conflicts(patches: Iterable[Patch]) -> Iterator[str]:
    """Yield a sentence for each target that another SGLang plugin hooks.

    A hook that is registered after TLT replaces the patched object, which `verify` detects.
    """
    registry = getattr(sys.modules.get(_HOOKS), "HookRegistry", None)
    for patch in patches:
        hooks = getattr(registry, "_hooks", {}).get(patch.target.replace(":", "."))
        if hooks:
            name = getattr(hooks[0][-1], "plugin_name", "without a name")
            yield _conflict(patch, f"the SGLang plugin {name}")


def _conflict(patch: Patch, owner: str) -> str:
    return f"{patch.target} is already patched by other code ({owner}); disable one of the two."


def _owner(patch: Patch, definition: Definition) -> str:
    """Return who has patched the target before TLT; empty if it is what the source defines."""
    module = sys.modules[patch.module]
    _, _, raw = _resolve(module, patch)
    if raw is _MISSING:
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
        value = vars(source).get(name, _MISSING) if source is not None else _MISSING
        if name and (
            value is _MISSING or value is live or sys.modules.get(f"{origin}.{name}") is live
        ):
            return True
    return False
