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
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tlt_sglang.errors import PatchError
from tlt_sglang.patching.conflicts import hook_conflicts, target_conflicts
from tlt_sglang.patching.import_hook import ImportHook
from tlt_sglang.patching.patch import Only, Patch, inspect_patches, overlaps
from tlt_sglang.patching.source import Definition, SourceTree
from tlt_sglang.patching.targets import MISSING, bindings, is_own, resolve


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
        self._finder: ImportHook | None = None
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
        problems = problems or list(hook_conflicts(self._mine))
        problems = problems or target_conflicts(loaded, self._expected)
        if problems:
            versions = " or ".join(dict.fromkeys(v for p in self._mine for v in p.digests))
            raise PatchError(
                f"TLT does not fit {package} {tree.version} and patched nothing; use an unpatched "
                f"{package} {versions}, or resolve each problem: {' '.join(problems)}"
            )
        # All or none.
        self._finder = ImportHook((p.module for p in self._mine), self._after_import)
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
        holder, name, _ = resolve(sys.modules[patch.module], patch)
        live = inspect.getattr_static(holder, name, MISSING)
        entries = [live]
        if patch.kind == "register" and isinstance(live, (dict, list, type)):
            entries = live if isinstance(live, list) else [_members(live).get(patch.key)]
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
            if problems := target_conflicts(mine, self._expected):
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
        holder, name, raw = resolve(module, patch)
        record = _Applied(patch, patch.make(raw))
        self._applied.append(record)
        if patch.kind == "register":
            _register(raw, record)
            return
        setattr(holder, name, record.ours)
        record.undo.append(functools.partial(setattr, holder, name, raw))
        if holder is module and is_own(raw, module, self._expected[patch.target]):
            for other, bound in bindings(raw, module):
                setattr(other, bound, record.ours)
                record.undo.append(functools.partial(setattr, other, bound, raw))
        if holder is module and _is_only_ours(record):
            record.undo.append(functools.partial(_unbind, record.ours, raw, module))

    def _undo(self, records: list[_Applied]) -> None:
        for record in reversed(records):
            for step in reversed(record.undo):
                step()
        self._applied = [a for a in self._applied if all(a is not r for r in records)]


def _members(container: dict[object, object] | type) -> Mapping[Any, object]:
    return vars(container) if isinstance(container, type) else container


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
    elif isinstance(container, type) and isinstance(key, str) and key not in vars(container):
        setattr(container, key, ours)
        record.undo.append(functools.partial(delattr, container, key))
    else:
        raise PatchError(
            f"{record.patch.target} is a {type(container).__name__}; use a key for a dict, None "
            "for a list, and the name of a new attribute for a class."
        )


def _remove(container: list[object], ours: object) -> None:
    """Remove the last entry that is `ours`, which is the one that was appended."""
    for index in reversed(range(len(container))):
        if container[index] is ours:
            del container[index]
            return


def _is_only_ours(record: _Applied) -> bool:
    """Return whether other modules can have `ours` only through the patch."""
    package = record.patch.module.split(".")[0]
    home = str(getattr(record.ours, "__module__", "builtins")).split(".")[0]
    return callable(record.ours) and (
        record.patch.kind == "wrap" or home not in (package, "builtins")
    )


def _unbind(ours: object, raw: object, module: ModuleType) -> None:
    """Restore `raw` in modules that were imported since then and bound `ours`."""
    for other, bound in bindings(ours, module):
        setattr(other, bound, raw)
