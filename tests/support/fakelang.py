"""A small upstream package, `fakelang`, and patches of it."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlt_sglang.patching.patch import (
    Patch,
    registers_upstream,
    replaces_upstream,
    wraps_upstream,
)
from tlt_sglang.patching.source import SourceTree, source_digest

VERSION = "1.2.3"

MATHS = '''"""Upstream."""
import functools
LIMIT = 3
NOTHING = None
TABLE = {"a": 1, "b": 2}
CHOICES = ["x", "y"]

def double(value):
    """Twice."""
    return value * 2

async def later(value):
    return value

@functools.lru_cache
def cached(value):
    return value

class Worker:
    width: int = 4

    def run(self, value):
        return value + 1

    @staticmethod
    def still(value):
        return value + 2

    @classmethod
    def make(cls, value):
        return cls, value

    @property
    def size(self):
        return 5

    @size.setter
    def size(self, value):
        self.stored = value

    @functools.cached_property
    def once(self):
        return 6
'''

USER = """from fakelang.maths import LIMIT, NOTHING, Worker, cached, double
try:
    from fakelang.absent import kernel
except ImportError:
    kernel = None

def use(value):
    return double(value)
"""

FACTS: dict[str, Any] = {"why": "a test", "remove_when": "never", "process": "any"}


def load(name: str) -> Any:
    return importlib.import_module(f"fakelang.{name}")


def digest(target: str) -> str:
    module, qualname = target.split(":")
    return source_digest(SourceTree.from_installed("fakelang").read(module), qualname)


def with_digests(patch: Patch) -> Patch:
    return replace(patch, digests={VERSION: digest(patch.target)})


def wrap(name: str, change: Callable[..., Any], module: str = "maths", **more: Any) -> Patch:
    target = f"fakelang.{module}:{name}"
    return with_digests(wraps_upstream(target, **FACTS, **more)(change))


def swap(name: str, value: Any, module: str = "maths", **more: Any) -> Patch:
    target = f"fakelang.{module}:{name}"
    return with_digests(replaces_upstream(target, value, **FACTS, **more))


def register(name: str, key: Any, value: Any) -> Patch:
    target = f"fakelang.maths:{name}"
    return with_digests(registers_upstream(target, key, value, **FACTS))


def plus_100(original: Any, *args: Any) -> Any:
    return original(*args) + 100


def everything() -> list[Patch]:
    return [
        wrap("double", plus_100),
        wrap("Worker.run", plus_100),
        swap("LIMIT", 9),
        register("TABLE", "b", 20),
        wrap("use", plus_100, module="user"),
    ]


def snapshot() -> dict[str, Any]:
    """Return every object of the upstream package by its place."""
    objects: dict[str, Any] = {}
    for name in [n for n in sys.modules if n.split(".")[0] == "fakelang"]:
        for attribute, value in vars(sys.modules[name]).items():
            if not attribute.startswith("__"):
                objects[f"{name}.{attribute}"] = value
    maths = sys.modules["fakelang.maths"]
    objects |= {f"Worker.{name}": value for name, value in vars(maths.Worker).items()}
    objects |= {f"TABLE.{index}": item for index, item in enumerate(maths.TABLE.items())}
    objects |= {f"CHOICES.{index}": item for index, item in enumerate(maths.CHOICES)}
    return objects


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert value == after[name], name
        else:
            assert value is after[name], name


def foreign(*args: Any) -> Any:
    return args


def wheel(path: Path, maths: str, version: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fakelang/__init__.py", "raise RuntimeError('imported')\n")
        archive.writestr("fakelang/maths.py", maths)
        archive.writestr(f"fakelang-{version}.dist-info/METADATA", "Name: fakelang\n")
    return path
