"""SGLang's source, read and digested without importing it.

A digest stands for the code of one definition: comments, layout and docstrings do not count. So any
downloaded SGLang wheel can be checked on any machine.

Runs wherever patches are checked: in every process that loads SGLang's plugins, and in
`apply_patches.py`.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlt_sglang.errors import ConfigError, EnvironmentProblem, PatchError

_TRANSPARENT = {"staticmethod", "classmethod", "property", "cached_property", "abstractmethod"}
_TRANSPARENT |= {"setter", "getter", "deleter"}


@dataclass(frozen=True)
class Definition:
    """What the source says about one name; all its branches together."""

    digest: str
    kinds: frozenset[str]
    """Of "function", "class", "import", "value"."""
    lines: frozenset[int]
    """First lines, a decorator's line counting as the first, as in `co_firstlineno`."""
    decorated: bool
    """By more than what only changes the descriptor, such as `staticmethod`."""
    origins: tuple[tuple[str, str], ...]
    """For imports: (module, name); the name is empty when the module itself is bound."""


def source_digest(source: str, qualname: str) -> str:
    """16 hex digits for the code of `qualname`; comments, layout and docstrings do not count.

    Raises PatchError when the source does not define the name or cannot be parsed.
    """
    return describe(source, qualname).digest


def describe(source: str, qualname: str) -> Definition:
    """Find `qualname` ("f", "Class.method") in a module's source. Raises PatchError."""
    nodes = list(_find(_parse(source).body, qualname.split(".")))
    if not nodes:
        raise PatchError(f"{qualname} is not defined there: find what replaced it")
    decorators = [d for node in nodes for d in getattr(node, "decorator_list", [])]
    return Definition(
        digest=hashlib.sha256("\n".join(map(_canonical, nodes)).encode()).hexdigest()[:16],
        kinds=frozenset(map(_kind, nodes)),
        lines=frozenset(node.lineno for node in [*nodes, *decorators]),
        decorated=any(_last_name(d) not in _TRANSPARENT for d in decorators),
        origins=tuple(_origin(n) for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))),
    )


@functools.lru_cache(maxsize=1)
def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"its source cannot be parsed ({error}): use a newer Python") from error


def forget_parsed() -> None:
    """Free the syntax tree of the module that was read last."""
    _parse.cache_clear()


def _find(body: Iterable[ast.stmt], path: Sequence[str]) -> Iterator[ast.stmt]:
    for statement in _statements(body):
        node = _binding(statement, path[0])
        if node is not None and len(path) == 1:
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _find(node.body, path[1:])


def _statements(body: Iterable[Any]) -> Iterator[ast.stmt]:
    """The statements of a scope, also those inside `if`, `try`, `with` and their branches."""
    for node in body:
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for part in ("body", "handlers", "cases", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _binding(node: ast.stmt, name: str) -> ast.stmt | None:
    """The part of `node` that binds `name`: of an import only the one alias."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node if node.name == name else None
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            bound = alias.asname or alias.name
            if name == (bound if isinstance(node, ast.ImportFrom) else bound.split(".")[0]):
                only = copy.copy(node)
                only.names = [alias]
                return only
        return None
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for part in (part for target in targets if target for part in ast.walk(target)):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and part.id == name:
                return node
    return None


def _canonical(node: object) -> str:
    """A node as text that every supported Python prints alike, which `ast.unparse` does not."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    shown = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        absent = value is None and not isinstance(node, ast.Constant)
        if name not in ("ctx", "kind", "type_comment") and not absent and value != []:
            shown.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(shown)})"


def _kind(node: ast.stmt) -> str:
    kinds = {"FunctionDef": "function", "AsyncFunctionDef": "function", "ClassDef": "class"}
    kinds |= {"Import": "import", "ImportFrom": "import"}
    return kinds.get(type(node).__name__, "value")


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _origin(node: ast.Import | ast.ImportFrom) -> tuple[str, str]:
    alias = node.names[0]
    if isinstance(node, ast.ImportFrom):
        return "." * node.level + (node.module or ""), alias.name
    return (alias.name if alias.asname else alias.name.split(".")[0]), ""


@dataclass(frozen=True)
class SourceTree:
    """The source of one SGLang, installed or in a wheel; nothing of it is imported."""

    version: str
    load: Callable[[str], bytes]
    """File name inside the tree -> bytes; raises OSError or KeyError when there is none."""

    @classmethod
    def from_installed(cls, package: str) -> SourceTree:
        """The installed package. Raises EnvironmentProblem when there is none."""
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentProblem(f"{package} is not installed in this Python: install it first")
        root = Path(next(iter(spec.submodule_search_locations))).parent
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise EnvironmentProblem(
                f"{package} at {root} has no version: install it with pip"
            ) from None
        return cls(version, lambda name: (root / name).read_bytes())

    @classmethod
    def from_wheel(cls, path: str | os.PathLike[str]) -> SourceTree:
        """A downloaded wheel of any version. Raises ConfigError when it is not one."""
        wanted = "give the path of a downloaded SGLang wheel (.whl)"
        try:
            with zipfile.ZipFile(path) as wheel:
                infos = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
                files = {n: wheel.read(n) for n in wheel.namelist() if n.endswith(".py")}
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} cannot be read as a wheel ({error}): {wanted}") from error
        if len(infos) != 1:
            raise ConfigError(f"{path} is a zip file but not a wheel: {wanted}")
        return cls(
            infos[0].split("/")[0].removesuffix(".dist-info").split("-")[1], files.__getitem__
        )

    def read(self, module: str) -> str:
        """The source text of a module. Raises PatchError when the tree has no such module."""
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            try:
                return importlib.util.decode_source(self.load(name))
            except (OSError, KeyError):
                continue
        raise PatchError(f"there is no module {module}: find what replaced it")
