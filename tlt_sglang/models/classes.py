"""A lookup of SGLang's model classes that imports one module instead of all.

SGLang imports all of its 200 model modules to look up one class, which takes seconds of every
start. Runs in every process that resolves a model class; it registers no model of its own.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

PACKAGE = "sglang.srt.models"


class ModelRegistry(Protocol):
    """`sglang.srt.models.registry._ModelRegistry`."""

    models: dict[str, type]


def load_class(architecture: str) -> type | None:
    """Import the module of `architecture`, return the class; None leaves the lookup to SGLang."""
    package = importlib.import_module(PACKAGE)
    needle = f"class {architecture}(".encode()
    for folder in package.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            if needle not in path.read_bytes():
                continue
            module = importlib.import_module(f"{PACKAGE}.{path.stem}")
            entry = getattr(module, "EntryClass", ())
            for candidate in entry if isinstance(entry, list) else [entry]:
                if isinstance(candidate, type) and candidate.__name__ == architecture:
                    return candidate
    return None


def provide(registry: ModelRegistry, architectures: str | list[str]) -> None:
    """Add the first of `architectures` to SGLang's model registry unless it is there."""
    names = [architectures] if isinstance(architectures, str) else architectures
    if names and names[0] not in registry.models:
        model_class = load_class(names[0])
        if model_class is not None:
            registry.models[names[0]] = model_class
