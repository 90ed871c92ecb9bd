"""Every flag in the launch scripts, and in the server commands of the pages, exists."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from tlt_sglang import launch_server

pytestmark = pytest.mark.sglang

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SERVES = ("tlt serve", "tlt_sglang.launch_server", "sglang serve", "sglang.launch_server")


def commands() -> dict[str, str]:
    """Return the texts that start a server, by where they stand."""
    texts = {path.name: path.read_text() for path in sorted((ROOT / "launch").glob("*.sh"))}
    for page in PAGES:
        for block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if any(words in line for words in SERVES):
                    texts[f"{page.name}: {line.strip()}"] = line
    return texts


@pytest.fixture(scope="module")
def flags_of_parsers() -> set[str]:
    """Return the flags of our launcher and of SGLang's server, in full."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    ours = launch_server._parser()
    return {name for one in (parser, ours) for name in one._option_string_actions}


@pytest.mark.parametrize("text", commands().values(), ids=commands())
def test_the_flags_of_a_recipe_exist(text: str, flags_of_parsers: set[str]) -> None:
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z0-9]", re.sub(r"#.*", "", text)))
    assert flags <= flags_of_parsers


def test_the_flags_of_older_versions_do_not(flags_of_parsers: set[str]) -> None:
    assert (
        "--cuda-graph-max-bs-decode" in flags_of_parsers
        and "--cuda-graph-max-bs" not in flags_of_parsers
    )
    assert len(commands()) > 5
