"""A patch as data: its target, its reason, when to remove it, and the upstream code that it fits.

Patch files create `Patch` objects with the constructors here; `inspect_patches` compares them with
a source tree; `tlt_sglang.patching.patcher` applies them. Runs in every process that loads SGLang's
plugins, and in `apply_patches.py`. Nothing here changes SGLang.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    make: Callable[[Any], object]
    """Return the new value for the present one, which is the raw descriptor of a class member, or
    the container for "register"."""
    why: str
    remove_when: str
    process: str
    """The process it runs in, for readers."""
    only_on: Only = "any"
    kind: Literal["wrap", "replace", "register"] = "wrap"
    key: object = None
    """The key for "register" into a dict, or the new attribute of a class; None appends to a
    list."""
    file: str = ""
    """The patch file it comes from, filled in by `tlt_sglang.patches`."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """The `source_digest` of the target by exact SGLang version, filled in as `file` is."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", self.target):
            raise PatchError(
                f'The target {self.target!r} is not valid; write "package.module:Class.name".'
            )

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
    only_on: Only = "any",
) -> Callable[[Callable[..., Any]], Patch]:
    """Decorate `def f(original, *args, **kwargs)`, which then replaces calls of the target.

    A static, class or property member remains one. An `async def f` gives a coroutine function.
    """

    def decorate(function: Callable[..., Any]) -> Patch:
        def wrapped(original: Any) -> object:
            if isinstance(original, type):
                raise PatchError(f"{target} is a class; wrap one of its methods, or replace it.")

            @functools.wraps(original)
            def call(*args: object, **kwargs: object) -> object:
                return function(original, *args, **kwargs)

            @functools.wraps(original)
            async def call_async(*args: object, **kwargs: object) -> object:
                return await function(original, *args, **kwargs)

            return call_async if inspect.iscoroutinefunction(function) else call

        def make(raw: object) -> object:
            return _same_descriptor(raw, wrapped)

        return Patch(target, make, why, remove_when, process, only_on, "wrap")

    return decorate


def replaces_upstream(
    target: str,
    value: object,
    *,
    why: str,
    remove_when: str,
    process: str,
    only_on: Only = "any",
) -> Patch:
    """Replace a function, class, constant or imported name with `value`.

    A plain function that replaces a static, class or property member becomes one. If the value must
    be built from upstream objects, write `Patch(..., make=..., kind="replace")`.
    """

    def make(raw: object) -> object:
        if isinstance(value, FunctionType):
            return _same_descriptor(raw, lambda _original: value)
        return value

    return Patch(target, make, why, remove_when, process, only_on, "replace")


def registers_upstream(
    target: str,
    key: object,
    value: object,
    *,
    why: str,
    remove_when: str,
    process: str,
    only_on: Only = "any",
) -> Patch:
    """Set `key` of an upstream dict to `value`, or append `value` to a list (`key` None)."""
    return Patch(
        target,
        lambda _container: value,
        why,
        remove_when,
        process,
        only_on,
        "register",
        key,
    )


def unwrapped(raw: Any) -> Any:
    """Return the function inside a descriptor."""
    if isinstance(raw, (staticmethod, classmethod)):
        return raw.__func__
    if isinstance(raw, property):
        return raw.fget
    return raw.func if isinstance(raw, functools.cached_property) else raw


def _same_descriptor(raw: object, change: Callable[[Any], Any]) -> object:
    """Return `change` of the function inside a descriptor, in a descriptor of the same kind."""
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
class PatchFit:
    """The comparison of a patch with a source tree; it fits if `problem` is empty."""

    patch: Patch
    definition: Definition | None
    problem: str


def inspect_patches(patches: Iterable[Patch], tree: SourceTree) -> list[PatchFit]:
    """Compare every patch with the source, without importing it; the order is kept."""
    # By module, so that each source is parsed once.
    fits: dict[int, PatchFit] = {}
    patches = list(patches)
    for index in sorted(range(len(patches)), key=lambda i: patches[i].module):
        fits[index] = _inspect(patches[index], tree)
    upstream.forget_parsed()
    return [fits[index] for index in range(len(patches))]


def _inspect(patch: Patch, tree: SourceTree) -> PatchFit:
    where, digests = f"{patch.target} in SGLang {tree.version}", patch.digests
    try:
        definition = describe(tree.read(patch.module), patch.qualname)
    except PatchError as error:
        problem = f"{where} is missing: {error}, then move or remove the patch."
        return PatchFit(patch, None, problem)
    actual, expected = definition.digest, digests.get(tree.version)
    same = [version for version, digest in digests.items() if digest == actual]
    problem = ""
    if expected is not None and expected != actual:
        problem = f"{where} has changed (digest {actual}, not {expected}): adapt the patch to it."
    elif expected is None and same:
        problem = f"{where} is the same as in {same[-1]}: test the patch there."
    elif expected is None:
        versions = ", ".join(digests) or "any version"
        problem = f"{where} has no digest and differs from {versions}: adapt the patch to it."
    return PatchFit(patch, definition, problem)


def overlaps(patches: Sequence[Patch]) -> Iterator[str]:
    """Yield a sentence for every two patches whose result would depend on their order."""
    for index, one in enumerate(patches):
        for other in patches[index + 1 :]:
            same = one.target == other.target
            register = one.kind == other.kind == "register"
            if same and not (register and (one.key is None or one.key != other.key)):
                yield f"{one.target} has two patches: merge them into one."
            a, b = sorted((one, other), key=lambda patch: len(patch.target))
            if a.kind != "register" and b.target.startswith(a.target + "."):
                yield f"{a.target} is patched as a whole and in {b.target}: keep one of the two."


def table(patches: Iterable[Patch], versions: Sequence[str]) -> str:
    """Return the Markdown of patches/TABLE.md: all patches by file, a digest for each version."""
    files: dict[str, list[Patch]] = {}
    for patch in patches:
        files.setdefault(patch.file or "other files", []).append(patch)
    lines = [
        "# What TLT changes in SGLang",
        "",
        "Generated by `python apply_patches.py --write-table`; edit the patch files, not this one.",
        "The column of a version has the digest of the target, or none if the patch is not used.",
    ]
    columns = ["target", "kind", "process", "device", "why", "remove when", *versions]
    for file, group in sorted(files.items()):
        lines += ["", f"## {file}", ""]
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for p in group:
            target = f"`{p.target}`" + (f" [`{p.key!r}`]" if p.key is not None else "")
            digests = [f"`{p.digests[v]}`" if v in p.digests else "none" for v in versions]
            cells = (target, p.kind, p.process, p.only_on, p.why, p.remove_when, *digests)
            escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
            lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines) + "\n"
