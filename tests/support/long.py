"""Cases that `make test` leaves to `make test-all`: the same once more, on other servers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_and_long(names: Iterable[object], first: int = 1) -> list[Any]:
    """Return a parameter for each name; all but the `first` ones are `long`."""
    return [
        pytest.param(name, marks=[] if at < first else [pytest.mark.long])
        for at, name in enumerate(names)
    ]
