"""Only `patching/patcher.py` changes SGLang: nothing else sets attributes on what it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTERS = ("setattr", "delattr", "__setattr__", "__delattr__")
DOOR = ROOT / "tlt_sglang" / "patching" / "patcher.py"


def code() -> list[Path]:
    """Return our files, each once although `tlt_sglang/patches` is a link to `patches`."""
    files = [path for folder in ("tlt_sglang", "patches") for path in (ROOT / folder).rglob("*.py")]
    return sorted({path.resolve() for path in files} - {DOOR})


def imported(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names bound to anything of SGLang, and names bound to any module; in every scope."""
    upstream, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                modules.add(name)
                if alias.name.split(".")[0] == "sglang":
                    upstream.add(name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {alias.asname or alias.name for alias in node.names}
            if (node.module or "").split(".")[0] == "sglang":
                upstream |= names
    return upstream, modules


def root(node: ast.expr) -> str:
    """The name that `a.b[c].d` starts from; "()" where a module is looked up by a call."""
    while not isinstance(node, ast.Name):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            if ast.unparse(node) == "sys.modules":
                return "()"
            node = node.value
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func).endswith("import_module"):
                return "()"
            if ast.unparse(node.func) not in ("vars", "getattr") or not node.args:
                return ""
            node = node.args[0]
        else:
            return ""
    return node.id


def violations(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    upstream, modules = imported(tree)
    for node in ast.walk(tree):
        written: list[ast.expr] = []
        forbidden = upstream | {"()"}
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            written = [node] if isinstance(node.ctx, (ast.Store, ast.Del)) else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SETTERS:
            forbidden |= modules
            written = node.args[:1]
        for target in written:
            if root(target) in forbidden:
                yield f"line {target.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", code(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_door(path: Path) -> None:
    assert list(violations(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import sglang.srt.x as x\nx.f = 1",
        "import sglang\nsglang.srt.x.f = 1",
        "def g():\n    from sglang.srt.x import C\n    C.f = C.g = 1",
        "from sglang.srt.x import C\nC.f += 1",
        "from sglang.srt.x import C\ndel C.f",
        "from sglang.srt.x import TABLE\nTABLE['a'] = 1",
        "from sglang.srt import x\nx.__dict__['f'] = 1",
        "from sglang.srt import x\nvars(x)['f'] = 1",
        "from sglang.srt import x\nfor x.f in (1,): pass",
        "from sglang.srt import x\nsetattr(x, 'f', 1)",
        "from sglang.srt.x import C\nobject.__setattr__(C, 'f', 1)",
        "import torch\nsetattr(torch.nn, 'f', 1)",
        "import sys\nsys.modules['sglang'].f = 1",
        "import sys\nsys.modules['sglang'] = None",
        "import importlib\nimportlib.import_module('sglang').f = 1",
        "import importlib\nsetattr(importlib.import_module('sglang'), 'f', 1)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "from sglang.srt.x import C\none = C()\none.f = 1\nsetattr(one, 'f', 1)",
        "from sglang.srt.x import C\nC().f = 1\nprint(C.f, C['a'])",
        "class A:\n    def f(self):\n        from sglang.srt.x import C\n        self.c = C",
    ],
)
def test_the_search_leaves_instances_alone(source: str) -> None:
    assert not list(violations(source))
