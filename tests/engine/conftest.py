"""Engine tests: what they share, their order, and that nothing of theirs is left at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.fitting import Tiny, fit_drafters, make_tiny
from tests.support.identity import PINNED, POOL, Reference
from tests.support.prompts import prompts
from tests.support.servers import MODEL, Server, Servers, model_folder
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.harvest.segments import is_orphan, open_to_read
from tlt_sglang.launcher.server_process import can_bind

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "server(name): which server the test uses; those of one name run together"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests here that use the same server one after the other."""
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(HERE)]
    ours = [items[i] for i in places]
    ranks: dict[object, int] = {}
    order = {}
    for item in ours:
        marker = item.get_closest_marker("server")
        name = marker.args if marker else item.path
        order[item] = ranks.setdefault(name, len(ranks))
    for i, item in zip(places, sorted(ours, key=order.__getitem__), strict=True):
        items[i] = item


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the engine tests measured: ties, accept lengths, seconds."""
    lines = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            properties = getattr(report, "user_properties", None)
            if properties and report.when == "call" and "tests/engine" in report.nodeid:
                values = ", ".join(f"{name} {value}" for name, value in properties)
                lines.append(f"{report.nodeid.rpartition('/')[2]}: {values}")
    if lines:
        terminalreporter.section("engine")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The pool. At the end nothing is left: no process, no port, no shared memory."""
    segments = shared_memory()
    children = set(psutil.Process().children(recursive=True))
    pool = Servers(tmp_path_factory.mktemp("servers"))
    try:
        yield pool
    finally:
        pool.close()
    left = set(psutil.Process().children(recursive=True)) - children
    assert [child.cmdline() for child in left] == []
    assert [server.port for server in pool.started if not can_bind(server.port)] == []
    assert [path for path in shared_memory() - segments if not _has_writer(path)] == []


@pytest.fixture(scope="session")
def reference(servers: Servers) -> Reference:
    """Generate from each of the twenty prompts without speculation."""
    return Reference(servers, prompts())


@pytest.fixture(scope="session")
def drafters(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of an EAGLE and an EAGLE-3 drafter that know the reference by heart."""
    folder = tmp_path_factory.mktemp("drafters")
    return fit_drafters(folder, model_folder(MODEL), reference.texts())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A target with steps of milliseconds, where thousands are needed."""
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(servers: Servers, drafters: dict[str, str], strategy: str) -> Server:
    """The default model under the test's `strategy`; see `identity.each`."""
    drafter = drafters.get(strategy.partition(":")[0])
    if strategy != PINNED:
        return servers.get(strategy, drafter=drafter)
    server = servers.get(POOL, "--tlt-policy", "random", drafter=drafter)
    server.post("/tlt/strategy", {"strategy": strategy})
    return server


def shared_memory() -> set[Path]:
    """Our segments in shared memory."""
    return set(Path("/dev/shm").glob("*tlt*"))


def _has_writer(path: Path) -> bool:
    """Return whether it is the log of an engine that runs: of another program, once ours have
    ended."""
    try:
        file = open_to_read(path)
    except EnvironmentProblem:
        return True  # its program has removed it meanwhile
    try:
        return not is_orphan(file)
    finally:
        os.close(file)
