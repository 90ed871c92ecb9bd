"""Give each test the mark of its folder, torch one thread, and pytest its options.

The threads of torch spin while they wait, where another process needs the core.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of all folders, so that one command line suits every one of them."""
    parser.addoption(
        "--all-prompts",
        action="store_true",
        help="engine tests also send all twenty prompts one by one; takes three minutes more",
    )
    parser.addoption(
        "--answers",
        type=int,
        default=18,
        help="sampled answers that are compared with plain decoding's",
    )
    parser.addoption("--answers-json", help="file for the counts of that comparison")
    parser.addoption(
        "--rounds", type=int, default=1, help="how often each part of a fleet is killed"
    )
    parser.addoption("--rounds-json", help="file for what followed")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with the folder below tests/ that it lies in: such as unit or engine."""
    item.add_marker(item.path.relative_to(HERE).parts[0])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage until the tests run, and none of what importing them has left."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that import SGLang: it takes seconds, and only one worker needs it."""
    items.sort(key=lambda item: item.get_closest_marker("sglang") is None)


def pytest_collection_finish() -> None:
    """Give torch one thread here, so that the process that only distributes tests does without."""
    import torch

    torch.set_num_threads(1)
