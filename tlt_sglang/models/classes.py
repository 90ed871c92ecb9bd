"""Which of SGLang's model modules holds an architecture, found without importing the others.

SGLang imports all of its two hundred model modules to look up one class, seconds of every start.
Runs in any process that resolves a model class.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

PACKAGE = "sglang.srt.models"


def find(architecture: str) -> Any | None:
    """The class of `architecture`, importing its module alone; None to have SGLang look itself."""
    package = importlib.import_module(PACKAGE)
    needle = f"class {architecture}(".encode()
    for folder in package.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            if needle not in path.read_bytes():
                continue
            module = importlib.import_module(f"{PACKAGE}.{path.stem}")
            entry = getattr(module, "EntryClass", ())
            for candidate in entry if isinstance(entry, list) else [entry]:
                if getattr(candidate, "__name__", None) == architecture:
                    return candidate
    return None


def provide(registry: Any, architectures: str | list[str]) -> None:
    """Put the first of `architectures` into SGLang's model registry, if it is not there."""
    names = [architectures] if isinstance(architectures, str) else architectures
    if names and names[0] not in registry.models:
        found = find(names[0])
        if found is not None:
            registry.models[names[0]] = found
