"""docs/configuration.md and docs/refused.md are generated, and show the data as it is."""

from __future__ import annotations

import pytest

from tlt_sglang.config import page
from tlt_sglang.config.refused import ROWS
from tlt_sglang.config.settings import SETTINGS


def test_the_page_is_not_stale() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), (
        "docs/configuration.md is stale; run python -m tlt_sglang.config.page --write"
    )


def test_the_page_of_refusals_is_not_stale() -> None:
    assert page.REFUSED.read_text(encoding="utf-8") == page.refused_page(), (
        "docs/refused.md is stale; run python -m tlt_sglang.config.page --write"
    )


def test_every_refusal_is_on_its_page() -> None:
    text = page.refused_page()
    for row in ROWS:
        assert text.count(f"| {row.title} |") == 1


def test_every_setting_is_on_the_page() -> None:
    text = page.page()
    for setting in SETTINGS.values():
        assert text.count(f"| `{setting.name}` |") == 1
        assert setting.help in text


def test_it_prints_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([]) == 0
    assert capsys.readouterr().out == f"{page.page()}\n{page.refused_page()}"
