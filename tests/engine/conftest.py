"""Engine tests: the shared servers, their order, and that nothing of theirs is left at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from servers import Server, Servers, can_bind  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "server(name): which server the test uses; those of one name run together"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here `engine`, and run those that use the same server one after the other."""
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(HERE)]
    ours = [items[i] for i in places]
    ranks: dict[object, int] = {}
    order = {}
    for item in ours:
        item.add_marker(pytest.mark.engine)
        marker = item.get_closest_marker("server")
        name = marker.args if marker else item.path
        order[item] = ranks.setdefault(name, len(ranks))
    for i, item in zip(places, sorted(ours, key=order.__getitem__), strict=True):
        items[i] = item


def shared_memory() -> set[Path]:
    """Our segments in shared memory."""
    return set(Path("/dev/shm").glob("*tlt*"))


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The pool. At the end nothing is left: no process, no port, no shared memory."""
    segments = shared_memory()
    started: list[Server] = []

    class Recording(Servers):
        def get(self, *args: object, **kwargs: object) -> Server:
            server = super().get(*args, **kwargs)  # type: ignore[arg-type]
            if server not in started:
                started.append(server)
            return server

    pool = Recording(tmp_path_factory.mktemp("servers"))
    try:
        yield pool
    finally:
        pool.close()
    assert [child.cmdline() for child in psutil.Process().children(recursive=True)] == []
    assert [server.port for server in started if not can_bind(server.port)] == []
    assert shared_memory() <= segments
