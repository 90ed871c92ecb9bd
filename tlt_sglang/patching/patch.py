"""A patch is data: what it touches, why, when it can go, and the upstream code it was written for.

Patch files make `Patch` objects with the constructors here; `inspect_patches` holds them against
a source tree; `tlt_sglang.patching.patcher` applies them. Nothing here touches SGLang.

Runs in every process that loads SGLang's plugins, and in `apply_patches.py`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Literal

from tlt_sglang.errors import PatchError
from tlt_sglang.patching import source as upstream
from tlt_sglang.patching.source import Definition, SourceTree, describe

Only = Literal["any", "cpu", "cuda"]


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


def unwrapped(raw: Any) -> Any:
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
    upstream.forget_parsed()
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


def overlaps(patches: Sequence[Patch]) -> Iterator[str]:
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
