"""The one door to SGLang: every attribute TLT sets on it is set here, and can be taken back.

A patch is data (`Patch`): what it touches, why, when it can go, and a digest of the upstream source
it was written for, per exact SGLang version. A `Patcher` compares those digests with the installed
source, which it parses and never imports, patches the modules that are loaded and leaves one import
hook for those that are not, so nothing is imported because of TLT.

Runs in every process that loads SGLang's plugins, and in `apply_patches.py`. It holds no patch and
does not decide whether TLT is on. A function or class is also replaced where other loaded modules
of the package did `from X import Y`; a constant, or a name a module merely imported, is replaced
only in the module the target names.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

from tlt_sglang.errors import ConfigError, EnvironmentProblem, PatchError

Only = Literal["any", "cpu", "cuda"]
_MISSING = object()
_HOOKS = "sglang.srt.plugins.hook_registry"
_TRANSPARENT = {"staticmethod", "classmethod", "property", "cached_property", "abstractmethod"}
_TRANSPARENT |= {"setter", "getter", "deleter"}


# ---- the source: read and digested without importing it ------------------------------------------


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


# ---- a patch is data -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """One change to one name of SGLang."""

    target: str
    """"package.module:name" or "package.module:Class.name"."""
    make: Callable[[Any], Any]
    """What stands there now (for a class member the raw descriptor; for "register" the container)
    -> what shall stand there."""
    why: str
    remove_when: str
    process: str
    """In words: the process it runs in."""
    digests: Mapping[str, str]
    """Exact SGLang version -> `source_digest` of the target."""
    only_on: Only = "any"
    kind: Literal["wrap", "replace", "register"] = "wrap"
    key: Any = None
    """For "register" into a dict: the key; None appends to a list."""
    file: str = ""
    """The patch file it comes from, filled in by `tlt_sglang.patches.all_patches`."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.target):
            raise PatchError(f'Write the target {self.target!r} as "package.module:Class.name".')

    @property
    def module(self) -> str:
        return self.target.split(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.split(":")[1]


def wraps_upstream(
    target: str,
    *,
    why: str,
    remove_when: str,
    process: str,
    digests: Mapping[str, str],
    only_on: Only = "any",
) -> Callable[[Callable[..., Any]], Patch]:
    """Decorate `def f(original, *args, **kwargs)`; calls of the target become calls of `f`.

    A static, class or property member stays one. An `async def f` makes a coroutine function.
    """

    def decorate(function: Callable[..., Any]) -> Patch:
        def wrapped(original: Any) -> Any:
            if isinstance(original, type):
                raise PatchError(f"{target} is a class: wrap one of its methods, or replace it.")

            @functools.wraps(original)
            def call(*args: Any, **kwargs: Any) -> Any:
                return function(original, *args, **kwargs)

            @functools.wraps(original)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                return await function(original, *args, **kwargs)

            return call_async if inspect.iscoroutinefunction(function) else call

        def make(raw: Any) -> Any:
            return _same_descriptor(raw, wrapped)

        return Patch(target, make, why, remove_when, process, digests, only_on, "wrap")

    return decorate


def replaces_upstream(
    target: str,
    value: Any,
    *,
    why: str,
    remove_when: str,
    process: str,
    digests: Mapping[str, str],
    only_on: Only = "any",
) -> Patch:
    """Put `value` in the place of a function, class, constant or imported name.

    A plain function in the place of a static, class or property member becomes one. Where the
    value must be built from upstream objects, write `Patch(..., make=..., kind="replace")`.
    """

    def make(raw: Any) -> Any:
        if isinstance(value, FunctionType):
            return _same_descriptor(raw, lambda _original: value)
        return value

    return Patch(target, make, why, remove_when, process, digests, only_on, "replace")


def registers_upstream(
    target: str,
    key: Any,
    value: Any,
    *,
    why: str,
    remove_when: str,
    process: str,
    digests: Mapping[str, str],
    only_on: Only = "any",
) -> Patch:
    """Set `key` of an upstream dict to `value`, or append `value` to a list (`key` None)."""
    facts = (why, remove_when, process, digests, only_on)
    return Patch(target, lambda _container: value, *facts, "register", key)


def _unwrapped(raw: Any) -> Any:
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__
    if isinstance(raw, property):
        return raw.fget
    return raw.func if isinstance(raw, functools.cached_property) else raw


def _same_descriptor(raw: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(raw, (staticmethod, classmethod)):
        return type(raw)(change(raw.__func__))
    if isinstance(raw, property):
        return property(change(raw.fget), raw.fset, raw.fdel, raw.__doc__)
    if isinstance(raw, functools.cached_property):
        cached = functools.cached_property(change(raw.func))
        cached.__set_name__(object, raw.attrname or "")
        return cached
    return change(raw)


# ---- does a source tree fit the patches? ---------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One patch held against one source tree; fits when `problem` is empty."""

    patch: Patch
    definition: Definition | None
    problem: str


def inspect_patches(patches: Iterable[Patch], tree: SourceTree) -> list[Finding]:
    """Compare every patch with the source, without importing it; in the order given."""
    found: dict[int, Finding] = {}
    patches = list(patches)
    for index in sorted(range(len(patches)), key=lambda i: patches[i].module):
        found[index] = _inspect(patches[index], tree)
    _parse.cache_clear()
    return [found[index] for index in range(len(patches))]


def _inspect(patch: Patch, tree: SourceTree) -> Finding:
    where, known = f"{patch.target} in SGLang {tree.version}", patch.digests
    try:
        definition = describe(tree.read(patch.module), patch.qualname)
    except PatchError as error:
        return Finding(patch, None, f"{where} is gone, {error}, then move or drop the patch.")
    now, expected = definition.digest, known.get(tree.version)
    alike = [version for version, digest in known.items() if digest == now]
    problem = ""
    if expected is not None and expected != now:
        problem = f"{where} has changed (digest {now}, not {expected}): adapt the patch to it."
    elif expected is None and alike:
        problem = f"{where} reads as in {alike[-1]}: test it, then add its digest {now}."
    elif expected is None:
        versions = ", ".join(known) or "any version"
        problem = f"{where} has no digest and differs from {versions}: adapt, then add {now}."
    return Finding(patch, definition, problem)


def _overlaps(patches: Sequence[Patch]) -> Iterator[str]:
    """Two patches in each other's way would make the result depend on their order."""
    for index, one in enumerate(patches):
        for other in patches[index + 1 :]:
            same = one.target == other.target
            register = one.kind == other.kind == "register"
            if same and not (register and (one.key is None or one.key != other.key)):
                yield f"{one.target} has two patches: join them into one."
            a, b = sorted((one, other), key=lambda patch: len(patch.target))
            if a.kind != "register" and b.target.startswith(a.target + "."):
                yield f"{a.target} is patched whole and in {b.target}: keep one of the two."


# ---- applying and reverting ----------------------------------------------------------------------


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
        return [f.problem for f in found if f.problem] + list(_overlaps(self._mine))

    def apply(self) -> None:
        """Patch what is loaded, and what will be loaded when it is. Twice is once.

        Raises PatchError, which names every problem; then nothing stays changed.
        """
        if self._finder is not None or not self._mine:
            return
        package = self._mine[0].module.split(".")[0]
        tree = self._tree or SourceTree.from_installed(package)
        found = inspect_patches(self._mine, tree)
        problems = [f.problem for f in found if f.problem] + list(_overlaps(self._mine))
        self._expected = {f.patch.target: f.definition for f in found if f.definition}
        loaded = [p for p in self._mine if sys.modules.get(p.module) is not None]
        problems = problems or self._taken(loaded)
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
        return [
            f"{patch.target} is already patched by someone else ({owner}): disable one of the two."
            for patch, owner in zip(patches, owners, strict=True)
            if owner
        ]


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


def _owner(patch: Patch, definition: Definition) -> str:
    """Who has patched the target before us, in words; empty when it is what the source says."""
    registry = getattr(sys.modules.get(_HOOKS), "HookRegistry", None)
    hooks = getattr(registry, "_hooks", {}).get(patch.target.replace(":", "."))
    if hooks:
        source = hooks[0][-1]
        return f"the SGLang plugin {getattr(source, 'plugin_name', 'of an unknown name')}"
    module = sys.modules[patch.module]
    _, _, raw = _resolve(module, patch)
    if raw is _MISSING:
        return "it is missing from the loaded module"
    live = _unwrapped(raw)
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


# ---- the table -----------------------------------------------------------------------------------


def table(patches: Iterable[Patch], version: str) -> str:
    """The patches as Markdown for patches/TABLE.md, by file, with the digests of `version`."""
    files: dict[str, list[Patch]] = {}
    for patch in patches:
        files.setdefault(patch.file or "elsewhere", []).append(patch)
    lines = [
        f"# What TLT changes in SGLang {version}",
        "",
        "Written by `python apply_patches.py --write-table`; edit the patch files, not this one.",
    ]
    for file, group in sorted(files.items()):
        lines += ["", f"## {file}", ""]
        lines += ["| target | kind | process | device | why | remove when | digest |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for p in group:
            target = f"`{p.target}`" + (f" [`{p.key!r}`]" if p.key is not None else "")
            digest = f"`{p.digests[version]}`" if version in p.digests else "none"
            cells = (target, p.kind, p.process, p.only_on, p.why, p.remove_when, digest)
            escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"
