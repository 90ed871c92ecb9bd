"""The import directions between the rooms of the product: which room may import which.

A room is a folder of tlt_sglang, or a module at its top; `patches` is the folder of patches. Type
annotations and imports within functions count as imports.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tlt_sglang"

ALLOWED: dict[str, str] = {
    # Imported by everybody: the version, and the errors.
    "__init__": "",
    "errors": "",
    # Leaves: pure decisions, the patch layer, SGLang's versions and objects.
    "config.command_line": "errors",
    "patching": "errors",
    "upstream": "errors",
    "strategy": "errors",
    "admission": "errors",
    "serving": "",
    # Models, files and memory that engines and trainers share.
    "models": "errors strategy",
    "weights": "errors models",
    "harvest.log_size": "",
    "harvest": "errors weights harvest.log_size",
    "graphs": "errors strategy upstream",
    # Kernels and drafters.
    "cpu": "errors upstream",
    "drafters": "cpu",
    "sampling.ranking": "",
    "sampling": "upstream cpu sampling.ranking",
    # Settings, and what is built from them.
    "config": "errors strategy models graphs cpu config.command_line harvest.log_size",
    "graphs.commands": "errors config config.command_line graphs models strategy",
    "models.seed": "errors models config",
    "coordinator": "errors config config.command_line",
    # The processes: launcher, training, engine, sidecar.
    "launcher": "errors config coordinator harvest weights",
    "exporter": "errors config config.command_line coordinator harvest weights",
    "fleet": "errors config config.command_line coordinator harvest launcher weights",
    "observe": "__init__ errors config config.command_line coordinator fleet",
    "training": (
        "__init__ errors config.command_line harvest launcher models models.seed "
        "sampling.ranking weights"
    ),
    "engine": (
        "__init__ errors patching upstream strategy admission serving "
        "models.seed weights harvest harvest.log_size graphs cpu drafters sampling config "
        "coordinator"
    ),
    "sidecar": (
        "__init__ errors config config.command_line coordinator exporter harvest launcher observe "
        "training weights"
    ),
    # What meets SGLang, and what a person starts.
    "startup": "upstream serving config engine",
    "patches": (
        "errors patching upstream serving models cpu sampling config launcher engine startup"
    ),
    "launcher.environment": "errors config patching upstream patches",
    "plugin": "errors patching upstream config engine startup patches",
    "startup.tlt_sglang_startup": "plugin",
    "launch_server": (
        "errors config config.command_line harvest harvest.log_size launcher launcher.environment "
        "models models.seed"
    ),
    "cli": (
        "__init__ errors config config.command_line graphs coordinator observe launcher "
        "graphs.commands launcher.environment models training exporter sidecar launch_server "
        "patches"
    ),
}
"""Per room, the rooms that it may import. Rooms are in order: each imports only earlier ones.

A row of a module is an exception: the module stands apart from its room, lower or higher.

- config.command_line: the parser that all commands share; it knows no setting.
- harvest.log_size: the memory of a log, which the settings need to know.
- graphs.commands: the command line of `tlt plan`; the planner itself knows no setting.
- models.seed: begins a drafter in the store that a configuration names.
- startup.tlt_sglang_startup: stands apart from the package at the top of site-packages.
- launcher.environment: checks the patches, whose processes run the rest of the launcher.
"""


@dataclass(frozen=True)
class Arrow:
    """An import of one room by another."""

    source: str
    target: str
    place: str
    """The file and line of the import, relative to the repository."""

    @property
    def allowed(self) -> bool:
        """True if the table has it."""
        return self.target in ALLOWED.get(self.source, "").split()

    @property
    def upward(self) -> bool:
        """True if the target stands after the source in the table, or in neither place."""
        rooms = list(ALLOWED)
        if self.source not in rooms or self.target not in rooms:
            return True
        return rooms.index(self.target) >= rooms.index(self.source)

    def __str__(self) -> str:
        return f"{self.place}: {self.source} imports {self.target}"


def arrows() -> list[Arrow]:
    """Return every import between two rooms."""
    result = []
    for path in product_files():
        relative = path.relative_to(ROOT)
        source = room(module_name(relative))
        for line, name in imports(path):
            target = room(name)
            if name.split(".")[0] == PACKAGE and target != source:
                result.append(Arrow(source, target, f"{relative}:{line}"))
    return result


def product_files() -> list[Path]:
    """Return the Python files of the product, without the stand-in of sgl_kernel."""
    package = [path for path in (ROOT / PACKAGE).rglob("*.py") if "stand_in" not in path.parts]
    package = [path for path in package if path.relative_to(ROOT).parts[1] != "patches"]
    return sorted([*package, *(ROOT / "patches").rglob("*.py")])


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the product, given relative to the repository."""
    parts = path.with_suffix("").parts
    return ".".join((PACKAGE, *parts) if parts[0] == "patches" else parts)


def room(module: str) -> str:
    """Return the row of the table that a module, or a name in a module, belongs to."""
    parts = module.split(".")[1:]
    if ".".join(parts[:2]) in ALLOWED:
        return ".".join(parts[:2])
    is_dunder = not parts or parts[0].startswith("__")
    return "__init__" if is_dunder else parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that a file imports, in any scope."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@functools.cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which is read once."""
    return ast.parse(path.read_text(encoding="utf-8"))
