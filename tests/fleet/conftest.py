"""Fleet tests: how often everything is killed."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rounds", type=int, default=1, help="how often each part of a fleet is killed"
    )
