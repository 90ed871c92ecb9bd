"""The one door to SGLang: every attribute TLT sets on it is set here, and can be taken back.

A `Patcher` compares the patches' digests with the installed source, patches the modules that are
loaded and leaves one import hook for those that are not, so nothing is imported because of TLT.

Runs in every process that loads SGLang's plugins. It holds no patch and does not decide whether TLT
is on. A function or class is also replaced where other loaded modules of the package did
`from X import Y`; a constant, or a name a module merely imported, is replaced only in the module
the target names.
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
    """Lets the other finders find a module, and has it patched right after it was executed."""

    def __init__(self, wanted: Iterable[str], executed: Callable[[ModuleType], None]) -> None:
        self._wanted, self._executed, self._busy = set(wanted), executed, set[str]()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._wanted or fullname in self._busy:
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
            self._executed(module)

        # On the instance: the loader's type, and with it inspect.getsource, stay as they are.
        vars(loader)["exec_module"] = exec_module
        return spec


@dataclass
class _Applied:
    patch: Patch
    ours: Any
    undo: list[Callable[[], object]] = field(default_factory=list)


class Patcher:
    """Applies patches to this process, all or none, and takes them back."""

    def __init__(
        self, patches: Iterable[Patch], device: Only, tree: SourceTree | None = None
    ) -> None:
        """`device`: where this process computes; "any" takes all patches. `tree`: the source of
        what is installed; by default it is looked up."""
        self._patches = tuple(patches)
        self._mine = [p for p in self._patches if device == "any" or p.only_on in ("any", device)]
        self._tree = tree
        self._finder: _Finder | None = None
        self._applied: list[_Applied] = []
        self._failed: dict[str, str] = {}
        self._expected: dict[str, Definition] = {}

    def check(self, tree: SourceTree) -> list[str]:
        """What keeps the patches from fitting `tree`, a sentence each; empty when they fit."""
        found = inspect_patches(self._mine, tree)
        return [f.problem for f in found if f.problem] + list(overlaps(self._mine))

    def apply(self) -> None:
        """Patch what is loaded, and what will be loaded when it is. Twice is once.

        Raises PatchError, which names every problem; then nothing stays changed.
        """
        if self._finder is not None or not self._mine:
            return
        package = self._mine[0].module.split(".")[0]
        tree = self._tree or SourceTree.from_installed(package)
        found = inspect_patches(self._mine, tree)
        problems = [f.problem for f in found if f.problem] + list(overlaps(self._mine))
        self._expected = {f.patch.target: f.definition for f in found if f.definition}
        loaded = [p for p in self._mine if sys.modules.get(p.module) is not None]
        problems = problems or list(_hooked(self._mine)) or self._taken(loaded)
        if problems:
            versions = " or ".join(dict.fromkeys(v for p in self._mine for v in p.digests))
            raise PatchError(
                f"TLT does not fit the {package} {tree.version} of this process and patched "
                f"nothing; use {package} {versions} unpatched, or act on each: {' '.join(problems)}"
            )
        self._finder = _Finder((p.module for p in self._mine), self._after_import)
        sys.meta_path.insert(0, self._finder)
        try:
            self._install(loaded)
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Put back the very objects that were there, newest change first."""
        if self._finder is not None and self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder = None
        self._undo(self._applied)
        self._failed.clear()

    def verify(self) -> None:
        """Raise PatchError unless every patch is in force or waits for its module's import."""
        if self._finder is None and self._mine:
            raise PatchError("TLT's patches are not applied: check that its plugin was loaded.")
        problems = list(self._failed.values())
        for row in self.report():
            if row["state"] == "lost" and row["target"].split(":")[0] not in self._failed:
                problems.append(
                    f"The patch of {row['target']} is not in force any more: find what replaced "
                    "it, and disable that or TLT."
                )
        if problems:
            raise PatchError(" ".join(problems))

    def report(self) -> list[dict[str, str]]:
        """A row for each patch: target, kind and state, which is "in force", "waiting for import",
        "not for this device", "not applied" or "lost"."""
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
        # A module executed again has fresh objects: what was recorded for it holds no longer.
        self._applied = [a for a in self._applied if a.patch.module != name]
        self._failed.pop(name, None)
        mine = [p for p in self._mine if p.module == name]
        try:
            if problems := self._taken(mine):
                raise PatchError(" ".join(problems))
            self._install(mine)
        except Exception as error:
            self._failed[name] = str(error)
            raise

    def _install(self, patches: list[Patch]) -> None:
        """Imported names go last, so that they see what their own module was patched to."""
        before = list(self._applied)
        for patch in sorted(patches, key=lambda p: "import" in self._expected[p.target].kinds):
            try:
                self._patch(patch)
            except BaseException as error:
                self._undo([a for a in self._applied if all(a is not b for b in before)])
                if isinstance(error, PatchError) or not isinstance(error, Exception):
                    raise
                raise PatchError(
                    f"Patching {patch.target} failed ({error!r}) and was undone: mend the patch."
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

    def _taken(self, patches: list[Patch]) -> list[str]:
        """Which targets someone else has patched, a sentence for each."""
        owners = [_owner(p, self._expected[p.target]) for p in patches]
        return [_claim(p, owner) for p, owner in zip(patches, owners, strict=True) if owner]


def _resolve(module: ModuleType, patch: Patch) -> tuple[Any, str, Any]:
    """Who holds the target, under which name, and what stands there (raw, or _MISSING)."""
    holder: Any = module
    *owners, name = patch.qualname.split(".")
    for owner in owners:
        holder = vars(holder).get(owner)
        if not isinstance(holder, type):
            return holder, name, _MISSING
    return holder, name, vars(holder).get(name, _MISSING)


def _register(container: Any, record: _Applied) -> None:
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
            f"{record.patch.target} is a {type(container).__name__}: give a key for a dict, "
            "and None for a list."
        )


def _remove(container: list[Any], ours: Any) -> None:
    """Take out the last entry that is `ours`: it is the one that was appended."""
    for index in reversed(range(len(container))):
        if container[index] is ours:
            del container[index]
            return


def _is_own(raw: Any, module: ModuleType, definition: Definition) -> bool:
    """Is this a function or class that the module itself defines, known to others by identity?"""
    if definition.kinds <= {"function", "class"}:
        return callable(raw)
    return isinstance(raw, (FunctionType, type)) and raw.__module__ == module.__name__


def _is_only_ours(record: _Applied) -> bool:
    """Can another module have `ours` only through the patch?"""
    package = record.patch.module.split(".")[0]
    home = str(getattr(record.ours, "__module__", "builtins")).split(".")[0]
    return callable(record.ours) and (
        record.patch.kind == "wrap" or home not in (package, "builtins")
    )


def _unbind(ours: Any, raw: Any, module: ModuleType) -> None:
    """Put `raw` where modules imported since then bound `ours`."""
    for other, bound in _bindings(ours, module):
        setattr(other, bound, raw)


def _bindings(value: Any, module: ModuleType) -> list[tuple[ModuleType, str]]:
    """Where the other loaded modules of the package bind this very object."""
    package = module.__name__.split(".")[0]
    return [
        (other, bound)
        for name, other in list(sys.modules.items())
        if name.split(".")[0] == package and other is not module and isinstance(other, ModuleType)
        for bound, held in list(vars(other).items())
        if held is value
    ]


# ---- double ownership ----------------------------------------------------------------------------


def _hooked(patches: Iterable[Patch]) -> Iterator[str]:
    """Targets that another SGLang plugin has asked SGLang to change, a sentence for each.

    One that asks after us changes what we have put there, which `verify` sees.
    """
    registry = getattr(sys.modules.get(_HOOKS), "HookRegistry", None)
    for patch in patches:
        hooks = getattr(registry, "_hooks", {}).get(patch.target.replace(":", "."))
        if hooks:
            name = getattr(hooks[0][-1], "plugin_name", "of an unknown name")
            yield _claim(patch, f"the SGLang plugin {name}")


def _claim(patch: Patch, owner: str) -> str:
    return f"{patch.target} is already patched by someone else ({owner}): disable one of the two."


def _owner(patch: Patch, definition: Definition) -> str:
    """Who has patched the target before us, in words; empty when it is what the source says."""
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


def _is_written_in(live: Any, module: ModuleType, definition: Definition) -> bool:
    if not isinstance(live, FunctionType) or hasattr(live, "__wrapped__"):
        return False
    files = (live.__code__.co_filename, module.__file__ or "")
    same_file = len({os.path.realpath(file) for file in files}) == 1
    return same_file and live.__code__.co_firstlineno in definition.lines


def _is_imported(live: Any, module: ModuleType, definition: Definition) -> bool:
    """Is it what the import would bind now? Yes where that cannot be seen."""
    for origin, name in definition.origins:
        origin = importlib.util.resolve_name(origin, module.__package__)
        source = sys.modules.get(origin)
        if not name and (source is None or source is live):
            return True
        found = vars(source).get(name, _MISSING) if source is not None else _MISSING
        if name and (
            found is _MISSING or found is live or sys.modules.get(f"{origin}.{name}") is live
        ):
            return True
    return False
