"""Inspect TLT's patches without starting SGLang: whether they fit, and how they are applied.

A thin command line over `tlt_sglang.patching`, for users and maintainers. It reads SGLang's source
and imports none of it, so it needs no GPU. It patches nothing that lasts: patches live only in the
processes that SGLang's plugin entry point starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from tlt_sglang.config.settings import VARIABLE
from tlt_sglang.errors import ConfigError, TltError
from tlt_sglang.patches import DIGESTS, all_patches, patches_of
from tlt_sglang.patching.patch import Patch, PatchFit, inspect_patches, table
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.patching.source import SourceTree
from tlt_sglang.upstream import versions

ENTRY_POINT = "tlt_sglang.plugin:load"
TABLE = Path(__file__).resolve().parent / "patches" / "TABLE.md"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: see --help.")


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """0: all is well. 1: something does not fit. 2: the request cannot be carried out."""
    try:
        options = _parser().parse_args(arguments)
        if options.list:
            return _list(all_patches())
        if options.write_table:
            TABLE.write_text(table(all_patches(), list(versions.SHAPES)), encoding="utf-8")
            print(f"Wrote {TABLE}.")
            return 0
        wheel = options.check or options.write_digests
        tree = SourceTree.from_wheel(wheel) if wheel else SourceTree.from_installed("sglang")
        if options.check is not None:
            return _check(tree)
        if options.write_digests is not None:
            return _write_digests(tree)
        return _explain(patches_of(versions.shape_of(tree.version)), tree, environ)
    except (TltError, OSError) as error:
        print(f"apply_patches.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="apply_patches.py",
        description="Without an option: print whether and how the patches are applied to SGLang.",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="WHEEL",
        help="print which patches the installed SGLang, or a downloaded wheel, would break",
    )
    one.add_argument("--list", action="store_true", help="list the patches")
    one.add_argument("--write-table", action="store_true", help="write patches/TABLE.md")
    one.add_argument(
        "--write-digests",
        nargs="?",
        const="",
        metavar="WHEEL",
        help="write patches/digests/VERSION.json from the installed SGLang, or a downloaded wheel",
    )
    return parser


def _list(patches: Sequence[Patch]) -> int:
    for patch in patches:
        device = "" if patch.only_on == "any" else f", on {patch.only_on} only"
        print(f"{patch.target}\n    {patch.kind}, {patch.process} process{device}: {patch.why}")
    return 0


def _check(tree: SourceTree) -> int:
    if tree.version not in versions.SHAPES:
        return _compare(tree)
    patches = patches_of(versions.shape_of(tree.version))
    problems = Patcher(patches, "any", tree).check(tree)
    for problem in problems:
        print(problem)
    if problems:
        print(f"{_count(len(problems), 'problem')} with SGLang {tree.version}.")
    else:
        fit = _count(len(patches), "patch", "patches")
        print(f"SGLang {tree.version}: nothing breaks ({fit} checked).")
    return 1 if problems else 0


def _compare(tree: SourceTree) -> int:
    """Print what an unknown version lacks of the shape that it is nearest to."""
    shapes = reversed(dict.fromkeys(versions.SHAPES.values()))
    fits = {shape: inspect_patches(patches_of(shape), tree) for shape in shapes}
    same = {shape: sum(map(_is_same, fits[shape])) for shape in fits}
    nearest = max(same, key=lambda shape: same[shape])
    for fit in fits[nearest]:
        print(fit.problem)
    total = len(fits[nearest])
    missing = sum(fit.definition is None for fit in fits[nearest])
    print(
        f"SGLang {tree.version} is not supported; TLT runs on {versions.supported()}. The nearest "
        f"shape is {nearest}: of its {_count(total, 'target')} {same[nearest]} are the same, "
        f"{total - same[nearest] - missing} differ, {missing} are missing. See docs/upgrading.md."
    )
    return 1


def _is_same(fit: PatchFit) -> bool:
    return fit.definition is not None and fit.definition.digest in fit.patch.digests.values()


def _write_digests(tree: SourceTree) -> int:
    if tree.version not in versions.SHAPES:
        raise ConfigError(
            f"SGLang {tree.version} has no shape: add it to tlt_sglang/upstream/versions.py."
        )
    fits = inspect_patches(patches_of(versions.SHAPES[tree.version]), tree)
    missing = [fit.problem for fit in fits if fit.definition is None]
    for problem in missing:
        print(problem)
    if missing:
        return 1
    digests = {fit.patch.target: fit.definition.digest for fit in fits if fit.definition}
    path = DIGESTS / f"{tree.version}.json"
    path.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"Wrote {path}.")
    return 0


def _explain(patches: Sequence[Patch], tree: SourceTree, environ: Mapping[str, str]) -> int:
    """Print everything that decides whether the patches are applied."""
    points = [
        point
        for point in metadata.entry_points(group="sglang.srt.plugins")
        if point.value == ENTRY_POINT
    ]
    allowed = {name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",")} - {""}
    excluded = bool(allowed and points and points[0].name not in allowed)
    print(f"SGLang {tree.version} is installed; its files are not changed.")
    if not points:
        print("It does not see TLT's plugin, so no patch is applied: run `pip install -e .` here.")
    elif excluded:
        print("SGLANG_PLUGINS excludes TLT, so no patch is applied: add tlt to it, or unset it.")
    else:
        print("Each of its processes loads TLT's plugin, which patches that process in memory.")
    if environ.get(VARIABLE, "").strip():
        print(f"TLT is on in this environment: {VARIABLE} is set.")
    else:
        print(
            f"TLT is off in this environment: start tlt_sglang.launch_server with --adaptive-spec, "
            f"or set {VARIABLE} to a file."
        )
    for fit in inspect_patches(patches, tree):
        print(fit.problem or f"{fit.patch.target} fits.")
    broken = Patcher(patches, "any", tree).check(tree)
    if broken:
        print(f"{_count(len(broken), 'problem')}: TLT would refuse to start.")
    return 1 if broken or not points or excluded else 0


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


if __name__ == "__main__":
    sys.exit(main())
