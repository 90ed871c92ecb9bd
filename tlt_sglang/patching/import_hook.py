"""The import hook through which a patcher learns that a module was imported.

Runs in every process that loads SGLang's plugins. It neither finds nor loads a module itself.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class ImportHook(MetaPathFinder):
    """Calls `after_import` right after one of `modules` was executed."""

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
