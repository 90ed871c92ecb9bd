"""SGLang's source, read and digested without importing it.

A digest represents the code of one definition, without comments, layout and docstrings, so that any
downloaded SGLang wheel can be checked on any machine. Runs in every process that loads SGLang's
plugins, and in `apply_patches.py`. It applies nothing.
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

from tlt_sglang.errors import ConfigError, EnvironmentProblem, PatchError

_TRANSPARENT = {"staticmethod", "classmethod", "property", "cached_property", "abstractmethod"}
_TRANSPARENT |= {"setter", "getter", "deleter"}


@dataclass(frozen=True)
class Definition:
    """The definition of one name in the source; all its branches together."""

    digest: str
    kinds: frozenset[str]
    """Some of "function", "class", "import", "value"."""
    lines: frozenset[int]
    """The first lines, which are those of decorators if there are any, as in `co_firstlineno`."""
    decorated: bool
    """True if a decorator does more than change the descriptor, as `staticmethod` does."""
    origins: tuple[tuple[str, str], ...]
    """For imports, the module and the name; the name is empty if the module itself is bound."""


def source_digest(source: str, qualname: str) -> str:
    """Return 16 hex digits for the code of `qualname` without comments, layout and docstrings.

    Raises PatchError if the source does not define the name or cannot be parsed.
    """
    return describe(source, qualname).digest


def describe(source: str, qualname: str) -> Definition:
    """Return the definition of `qualname` ("f", "Class.method") in a source. Raises PatchError."""
    nodes = list(_find(_parse(source).body, qualname.split(".")))
    if not nodes:
        raise PatchError(f"{qualname} is not defined there: find its replacement")
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
    """Free the syntax tree of the last module."""
    _parse.cache_clear()


def _find(body: Iterable[ast.stmt], path: Sequence[str]) -> Iterator[ast.stmt]:
    for statement in _statements(body):
        node = _binding(statement, path[0])
        if node is not None and len(path) == 1:
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _find(node.body, path[1:])


def _statements(body: Iterable[ast.AST]) -> Iterator[ast.stmt]:
    """Yield the statements of a scope, including those inside `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for part in ("body", "handlers", "cases", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))


def _binding(node: ast.stmt, name: str) -> ast.stmt | None:
    """Return the part of `node` that binds `name`; of an import only the one alias."""
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
    """Return a node as text that is the same in every supported Python, unlike `ast.unparse`."""
    if isinstance(node, list):
        return "[" + ",".join(map(_canonical, node)) + "]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        ):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        absent = value is None and not isinstance(node, ast.Constant)
        if name not in ("ctx", "kind", "type_comment") and not absent and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


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
    """The source of an SGLang version, installed or in a wheel; nothing of it is imported."""

    version: str
    load: Callable[[str], bytes]
    """Return the bytes of a file in the tree; raises OSError or KeyError if there is none."""

    @classmethod
    def from_installed(cls, package: str) -> SourceTree:
        """Return the installed package. Raises EnvironmentProblem if there is none."""
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentProblem(
                f"{package} is not installed in this Python; install it first."
            )
        root = Path(next(iter(spec.submodule_search_locations))).parent
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise EnvironmentProblem(
                f"{package} at {root} has no version; install it with pip."
            ) from None
        return cls(version, lambda name: (root / name).read_bytes())

    @classmethod
    def from_wheel(cls, path: str | os.PathLike[str]) -> SourceTree:
        """Return the source in a downloaded wheel. Raises ConfigError if it is not a wheel."""
        advice = "pass the path of a downloaded SGLang wheel (.whl)."
        try:
            with zipfile.ZipFile(path) as wheel:
                infos = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
                files = {n: wheel.read(n) for n in wheel.namelist() if n.endswith(".py")}
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path} cannot be read as a wheel ({error}); {advice}") from error
        if len(infos) != 1:
            raise ConfigError(f"{path} is a zip file but not a wheel; {advice}")
        return cls(
            infos[0].split("/")[0].removesuffix(".dist-info").split("-")[1], files.__getitem__
        )

    def read(self, module: str) -> str:
        """Return the source text of a module. Raises PatchError if the tree does not have it."""
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            try:
                return importlib.util.decode_source(self.load(name))
            except (OSError, KeyError):
                continue
        raise PatchError(f"there is no module {module}: find its replacement")
