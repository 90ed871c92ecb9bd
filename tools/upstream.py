"""The names of SGLang that TLT relies on and a version does not have; digests do not cover them.

`python -m tools.upstream WHEEL` reads a downloaded wheel, imports nothing of it, and prints

- imports of the product that the wheel cannot satisfy,
- attributes in the Protocols of `tlt_sglang/upstream/` that occur nowhere in its source.

An attribute that is listed may be needed by one shape only; one that is not listed may still mean
something else there.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator

from tlt_sglang.errors import PatchError
from tlt_sglang.patching.source import SourceTree, describe
from tools.directions import PACKAGE, ROOT, parse, product_files

UPSTREAM = ROOT / PACKAGE / "upstream"


def missing_imports(tree: SourceTree) -> Iterator[str]:
    """Yield the imports of SGLang in the product that a source tree cannot satisfy."""
    for path in product_files():
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            module = node.module or ""
            if module.split(".")[0] != "sglang":
                continue
            for alias in node.names:
                if not _has(tree, module, alias.name):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {module}.{alias.name}"


def missing_attributes(source_words: frozenset[str]) -> Iterator[str]:
    """Yield the attributes of Protocols that are not among the `source_words`."""
    for path in sorted(UPSTREAM.glob("*.py")):
        for node in parse(path).body:
            if not isinstance(node, ast.ClassDef) or path.stem == "api":
                continue
            if not any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases):
                continue
            for name, line in _attributes(node):
                if name not in source_words and not name.startswith("__"):
                    yield f"{path.relative_to(ROOT)}:{line}: {node.name}.{name}"


def words(sources: Iterable[bytes]) -> frozenset[str]:
    """Return every name in the files of a source."""
    return frozenset(
        word for source in sources for word in re.findall(r"\w+", source.decode("utf-8", "replace"))
    )


def _sources(wheel: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                yield archive.read(name)


def _has(tree: SourceTree, module: str, name: str) -> bool:
    """Return whether a module has a name: a submodule, a definition, or an import."""
    with contextlib.suppress(PatchError):
        tree.read(f"{module}.{name}")
        return True
    with contextlib.suppress(PatchError):
        source = tree.read(module)
        if "import *" in source:
            return True
        describe(source, name)
        return True
    return False


def _attributes(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id, part.lineno
        elif isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield part.name, part.lineno


def main() -> int:
    """Print what is missing; 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tools.upstream", description=__doc__)
    parser.add_argument("wheel", help="path of a downloaded SGLang wheel")
    wheel = parser.parse_args().wheel
    tree = SourceTree.from_wheel(wheel)
    lines = [*missing_imports(tree), *missing_attributes(words(_sources(wheel)))]
    print("\n".join(lines) or f"SGLang {tree.version} has every name that is relied on.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
