"""The servers that requests of all kinds are tried on."""

from __future__ import annotations

import pytest

from tests.support.identity import PINNED, POOL
from tests.support.servers import Server, Servers

STORE = "store and sidecar"
KINDS = ("pool", "one strategy", STORE)
ALLOWED = (
    *("--enable-custom-logit-processor", "--enable-return-hidden-states"),
    *("--context-length", "1024"),
)
"""Flags of every server here: what requests are allowed to ask for, and how long an answer without
a limit becomes."""
NGRAMS = "ngram:8"
"""A strategy that runs in SGLang's own n-gram worker."""
POOL3 = POOL.replace("eagle:", "eagle3:")
"""The same pool for a drafter that a sidecar trains."""


@pytest.fixture(scope="session")
def folder_of_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("requests") / "store")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `speculative` on each kind of server."""
    if "speculative" in metafunc.fixturenames:
        marks = {kind: [pytest.mark.server(kind)] for kind in KINDS}
        for kind in KINDS[1:]:
            marks[kind].append(pytest.mark.long)
        metafunc.parametrize("kind", [pytest.param(kind, marks=marks[kind]) for kind in KINDS])


@pytest.fixture(autouse=True)
def no_sidecar_beside_other_servers(request: pytest.FixtureRequest, servers: Servers) -> None:
    """Stop the server with the sidecar when its tests are over: it trains on a core of its own."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("kind") != STORE:
        for server in [*servers.running.values()]:
            if "--tlt-sidecar" in server.spec.flags:
                servers.drop(server)


@pytest.fixture
def speculative(
    servers: Servers, drafters: dict[str, str], folder_of_store: str, kind: str
) -> Server:
    """A server of this kind; with a pool, the policy draws a strategy for every step."""
    drafter = drafters["eagle3" if kind == STORE else "eagle"]
    if kind == "one strategy":
        return servers.get(PINNED, *ALLOWED, drafter=drafter)
    flags = [*ALLOWED, "--tlt-policy", "random"]
    if kind == "pool":
        return servers.get(POOL, *flags, drafter=drafter)
    flags += ["--tlt-store", folder_of_store, "--tlt-sidecar", "always"]
    return servers.get(POOL3, *flags, drafter=drafter)


@pytest.fixture
def plain(servers: Servers) -> Server:
    """The server without speculation."""
    return servers.get("off", *ALLOWED)
