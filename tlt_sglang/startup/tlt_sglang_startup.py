"""The hook that loads TLT into a process before anything of SGLang reads its arguments.

The wheel puts this file and `tlt_sglang.pth` at the top of site-packages. Python imports it at the
start of every process that has TLT_CONFIG set, so it imports next to nothing itself. When SGLang is
imported it loads the plugin, which SGLang's own entry point, if a stack ever reaches it, then finds
loaded. It stands apart from the package, so that it can say so if the package cannot be imported.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import NoReturn


class Hook:
    """Loads TLT once the package `sglang` is imported, and before any module of its server is.

    A finder in `sys.meta_path` that leaves finding and loading to the others.
    """

    def __init__(self) -> None:
        self._busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of another finder, with a loader that calls `_load` at its end."""
        if fullname != "sglang" or self._busy:
            return None
        self._busy = True
        try:
            finders = [getattr(finder, "find_spec", None) for finder in sys.meta_path]
            specs = (find(fullname, path, target) for find in finders if find is not None)
            spec: ModuleSpec | None = next(filter(None, specs), None)
        finally:
            self._busy = False
        if spec is None or spec.loader is None:
            return None
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _load()

        # Set on the instance, so that the loader's type, and inspect.getsource, stay unchanged.
        vars(loader)["exec_module"] = exec_module
        return spec


def _load() -> None:
    if not os.environ.get("TLT_CONFIG", "").strip():
        return
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    if allowed and "tlt" not in allowed:
        _end("SGLANG_PLUGINS excludes TLT; add tlt to it, or unset one of the two.")
    try:
        from tlt_sglang.plugin import load
    except Exception as error:
        _end(f"TLT cannot be imported ({error!r}); install tlt-sglang again, or unset TLT_CONFIG.")
    load()


def _end(problem: str) -> NoReturn:
    print(f"tlt-sglang: TLT_CONFIG is set, but {problem}", file=sys.stderr, flush=True)
    raise SystemExit(os.EX_CONFIG)


sys.meta_path.insert(0, Hook())
