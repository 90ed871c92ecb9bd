"""The pages name files, flags, headings and patches that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlt_sglang import __version__
from tlt_sglang.config.settings import SETTINGS
from tlt_sglang.patches import all_patches

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)

FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[(?:[^\[\]]|\\.)*\]\(([^()\s]+)\)")
FOLDERS = (".ci", "benchmarks", "docs", "launch", "patches", "requirements", "tests", "tlt_sglang")
FILE = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*")
"""A path of this repository; other paths are placeholders or belong to the user."""


def prose(page: Path) -> str:
    """Return a page without its fenced blocks, whose paths may be examples."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def files_named(page: Path) -> Iterator[str]:
    """Yield what stands in backticks and looks like a path of this repository."""
    for text in CODE.findall(prose(page)):
        yield from (word for word in text.split() if FILE.fullmatch(word))


def links(page: Path) -> Iterator[str]:
    """Yield the links that lead into this repository."""
    for target in LINK.findall(prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def table(page: Path, first: str) -> list[list[str]]:
    """Return the cells of a page's table whose header begins with the cell `first`."""
    _, _, below = prose(page).partition(f"\n| {first} |")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    assert rows, f"{page.name} has no table {first}"
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/overview.md", "docs/internals/cpu.md"} <= set(names(PAGES))
    assert sum(len(list(files_named(page))) for page in PAGES) > 40
    assert sum(len(list(links(page))) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    missing = [name for name in files_named(page) if not list(ROOT.glob(name.rstrip("/")))]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_of_a_page_resolves(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_flag_of_ours_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"--tlt-[a-z-]*[a-z]", page.read_text(encoding="utf-8")))
    assert named <= {setting.flag for setting in SETTINGS.values()} | {"--tlt-config"}


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index}
    assert pages <= linked


def test_the_gpu_page_lists_the_patches_that_apply_on_cuda() -> None:
    page = prose(ROOT / "docs" / "gpu.md")
    listed = {
        file: CODE.findall(targets)
        for file, targets in re.findall(
            r"^\| \[([\w/]+\.py)\]\(.*?\) \| (.*?) \|", page, re.MULTILINE
        )
    }
    expected: dict[str, list[str]] = {}
    for patch in all_patches():
        if patch.only_on != "cpu":
            expected.setdefault(patch.file, []).append(patch.qualname)
    assert {file: set(targets) for file, targets in listed.items()} == {
        file: set(targets) for file, targets in expected.items()
    }


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    versions = re.findall(
        r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] == __version__


def test_every_page_and_test_that_code_names_exists() -> None:
    code = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
    missing = {
        (str(path.relative_to(ROOT)), name)
        for path in code
        if path.suffix in (".py", ".sh")
        for name in re.findall(r"\b(?:docs|tests)/[\w/-]+\.(?:md|py)\b", path.read_text("utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_what_the_stacks_can_do_names_tests_that_exist() -> None:
    """Whatever a cell says that happens is followed by the letter of a file, and names of tests."""
    page, stacks = ROOT / "docs" / "rl-stacks.md", ROOT / "tests" / "stacks"
    files = dict(re.findall(r"^- ([A-Z]): `([\w/.]+)", prose(page), re.MULTILINE))
    cases = {path.stem for path in stacks.glob("*/*.*")}
    for stack, *cells in table(page, "Stack | starts"):
        assert len(cells) == 6, stack
        for part in (part for cell in cells for part in cell.split(";")):
            brackets = " ".join(re.findall(r"\[(.*?)\]", part))
            letters = re.findall(r"\b[A-Z]\b", CODE.sub("", brackets))
            tests = "".join((ROOT / files[letter]).read_text("utf-8") for letter in letters)
            for name in CODE.findall(brackets):
                assert f"def test_{name}(" in tests or name in cases, (stack, part)
            if "not possible" not in part and re.search(r"\b(works|refused|by its \w+)\b", part):
                assert letters, (stack, part)
