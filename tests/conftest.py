"""Every test has the mark of its folder; torch has one thread: its threads spin where a core is
taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with the folder below tests/ that it lies in: unit, patches, engine or gpu."""
    item.add_marker(item.path.relative_to(HERE).parts[0])
