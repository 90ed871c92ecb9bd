"""docs/configuration.md is generated from the settings, and shows them as they are."""

from __future__ import annotations

import pytest

from tlt_sglang.config import page
from tlt_sglang.config.settings import SETTINGS


def test_the_page_is_not_stale() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), (
        "docs/configuration.md is stale; run python -m tlt_sglang.config.page --write"
    )


def test_every_setting_is_on_the_page() -> None:
    text = page.page()
    for setting in SETTINGS.values():
        assert text.count(f"| `{setting.name}` |") == 1
        assert setting.help in text


def test_it_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([]) == 0
    assert capsys.readouterr().out == page.page()
