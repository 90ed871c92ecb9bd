"""No import runs upward between rooms, and training is apart from serving."""

from __future__ import annotations

import pytest

from tools.directions import ALLOWED, PACKAGE, ROOT, arrows, imports, module_name, product_files

TRAINING = ("training", "sidecar")
SERVING = ("sglang", "tlt_sglang.engine", "tlt_sglang.patches", "tlt_sglang.cpu")


def test_the_table_has_every_room() -> None:
    files = product_files()
    assert len(files) > 100
    rooms = {module_name(path.relative_to(ROOT)).split(".")[1] for path in files if path.stem}
    assert {name for name in ALLOWED if "." not in name} == rooms


@pytest.mark.parametrize("source", ALLOWED)
def test_a_room_may_import_only_lower_rooms(source: str) -> None:
    rooms = list(ALLOWED)
    targets = ALLOWED[source].split()
    assert len(targets) == len(set(targets))
    assert set(targets) <= set(rooms[: rooms.index(source)])


def test_every_import_between_rooms_is_allowed() -> None:
    imported = arrows()
    assert len(imported) > 200
    assert [str(arrow) for arrow in imported if not arrow.allowed] == []
    assert [str(arrow) for arrow in imported if arrow.upward] == []


def test_imports_are_absolute() -> None:
    assert [path for path in product_files() if "from ." in path.read_text()] == []


def test_training_never_imports_sglang() -> None:
    files = [path for path in product_files() if path.relative_to(ROOT).parts[1] in TRAINING]
    assert len(files) > 20
    imported = [
        f"{path.name}: {name}" for path in files for _, name in imports(path) if serves(name)
    ]
    assert imported == []


def test_serving_never_imports_training() -> None:
    above = [f"{PACKAGE}.{name}" for name in TRAINING]
    serving = [
        path
        for path in product_files()
        if path.relative_to(ROOT).parts[1] not in (*TRAINING, "cli.py")
    ]
    assert len(serving) > 40
    imported = [
        f"{path.name}: {name}"
        for path in serving
        for _, name in imports(path)
        if any(within(name, package) for package in above)
    ]
    assert imported == []


def serves(name: str) -> bool:
    return any(within(name, package) for package in SERVING)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")
