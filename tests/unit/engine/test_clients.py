"""The engine names, logs and ends what clients leave open, and notices older clients."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine.client_routes import VERSION_PATHS, kinds_to_free, remove_routes
from tlt_sglang.engine.clients import KINDS, Clients
from tlt_sglang.engine.weight_sync import SESSION_OPENED
from tlt_sglang.errors import ConfigError

pytestmark = pytest.mark.sglang


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Manager:
    """SGLang's tokenizer manager, with what its scheduler says of weight updates."""

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.is_pause = False
        self.session: str | None = None
        self.groups: list[str] = []
        self.released: list[str] = []
        self.calls: list[str] = []
        self.late = 0.0
        """Seconds that the scheduler takes to answer."""

    async def get_internal_state(self) -> list[dict[str, Any]]:
        updates = {
            "session": self.session,
            "process_groups": list(self.groups),
            "released": self.released,
        }
        clock = self.clients._clock
        assert isinstance(clock, Clock)
        clock.now += self.late
        return [{"tlt": {"weight_updates": updates}}]

    async def continue_generation(self, obj: Any) -> None:
        self.calls.append("continue")
        self.is_pause = False
        self.clients.paused(self, False, None)

    async def end_weight_update(self, obj: Any) -> tuple[bool, str]:
        self.calls.append("end")
        self.session = None
        return True, ""

    async def destroy_weights_update_group(self, obj: Any) -> tuple[bool, str]:
        self.calls.append(f"destroy {obj.group_name}")
        self.groups.remove(obj.group_name)
        return True, ""

    def pause(self, timeout: float | None = None) -> None:
        self.is_pause = True
        self.clients.paused(self, True, timeout)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of which a second passes in every tick of the watch."""
    made = Clock()

    async def tick(seconds: float) -> None:
        made.now += seconds
        await yield_once()

    monkeypatch.setattr(asyncio, "sleep", tick)
    return made


async def yield_once() -> None:
    """Let other tasks run."""
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, None)
    await future


@pytest.fixture
def clients(clock: Clock) -> Clients:
    return Clients(clock)


@pytest.fixture
def manager(clients: Clients) -> Manager:
    made = Manager(clients)
    clients.paused(made, False, None)
    return made


def request(name: str, **fields: object) -> object:
    return type(f"{name}ReqInput", (), fields)()


async def answered(_: object) -> Any:
    return [SimpleNamespace(success=True, message="Success")]


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_nothing_is_open_at_first(clients: Clients, manager: Manager) -> None:
    assert clients.status() == {"older": False, "waits_for": [], "reason": None}
    assert not clients.busy


def test_a_pause_and_a_session_are_named(clients: Clients, manager: Manager, clock: Clock) -> None:
    async def calls() -> None:
        manager.pause()
        await clients.call(answered, request("BeginWeightUpdate"), None)
        clock.now += 12
        assert clients.waits_for() == [
            {"what": "pause", "ends_with": "/continue_generation", "seconds": 12.0},
            {"what": "session", "ends_with": "/end_weight_update"},
        ]
        assert clients.reason() == (
            "The engine waits for /continue_generation and /end_weight_update; its client's last "
            "call was 12 s ago. If that client has gone, POST /tlt/free ends what it has left."
        )
        await clients.call(answered, request("EndWeightUpdate"), None)
        await manager.continue_generation(None)
        assert clients.reason() is None

    run(calls())


def test_a_session_that_is_refused_is_not_open(clients: Clients, manager: Manager) -> None:
    async def refused(_: object) -> Any:
        return [SimpleNamespace(success=False, message="already open")]

    run(clients.call(refused, request("BeginWeightUpdate"), None))
    assert clients.reason() is None


def test_a_call_that_does_not_end_makes_the_scheduler_busy(
    clients: Clients, manager: Manager, clock: Clock
) -> None:
    async def calls() -> None:
        begun = asyncio.Event()

        async def never(_: object) -> Any:
            begun.set()
            await asyncio.Event().wait()

        update = request("UpdateWeightsFromDistributed")
        task = asyncio.get_running_loop().create_task(clients.call(never, update, None))
        await begun.wait()
        clock.now += 3
        assert clients.busy
        ends = [row["ends_with"] for row in clients.waits_for()]
        assert ends == ["the end of /update_weights_from_distributed"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not clients.busy and clients.reason() is None

    run(calls())


def test_other_calls_are_passed_on(clients: Clients, manager: Manager, clock: Clock) -> None:
    clock.now += 5
    run(clients.call(answered, request("GetInternalState"), None))
    assert clients.silent_seconds == 5


@pytest.mark.parametrize(
    ("kinds", "calls"),
    [
        (KINDS, ["end", "destroy a", "destroy b", "continue"]),
        (("pause",), ["continue"]),
        (("groups",), ["destroy a", "destroy b"]),
    ],
)
def test_what_is_open_is_freed(
    clients: Clients, manager: Manager, kinds: tuple[str, ...], calls: list[str]
) -> None:
    async def free() -> list[str]:
        manager.pause()
        manager.session, manager.groups = "target", ["a", "b"]
        return await clients.free(kinds)

    freed = run(free())
    assert manager.calls == calls
    assert len(freed) == len(calls)


def test_nothing_open_nothing_freed(clients: Clients, manager: Manager) -> None:
    assert run(clients.free(KINDS)) == []
    assert manager.calls == []


def test_a_silent_client_is_timed_out(
    clients: Clients, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls() -> None:
        manager.pause(timeout=90)
        await clients.call(answered, request("BeginWeightUpdate"), 90)
        manager.session, manager.groups = "target", ["a"]
        assert clients._watch is not None
        await clients._watch

    with caplog.at_level(logging.WARNING):
        run(calls())
    assert manager.calls == ["end", "destroy a", "continue"]
    assert clients.reason() is None
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0].startswith("The engine waits for /continue_generation and /end_weight_update;")
    assert texts[1].startswith("No call of a client for 90 s (--tlt-client-timeout-s), so")
    assert "the weights may be those of two versions" in texts[3]


def test_an_engine_that_has_released_memory_is_not_timed_out(
    clients: Clients, manager: Manager
) -> None:
    async def calls() -> None:
        manager.pause(timeout=5)
        manager.released = ["weights"]
        for _ in range(30):
            await yield_once()
        assert manager.is_pause and manager.calls == []
        manager.released = []
        assert clients._watch is not None
        await clients._watch

    run(calls())
    assert manager.calls == ["continue"]


def test_a_client_whose_call_the_scheduler_carries_out_is_not_timed_out(
    clients: Clients, manager: Manager
) -> None:
    """As an update from disk, which is not among the calls that are known here."""

    async def calls() -> None:
        manager.pause(timeout=5)
        manager.late = 30.0
        for _ in range(30):
            await yield_once()
        assert manager.is_pause and manager.calls == []
        manager.late = 0.0
        assert clients._watch is not None
        await clients._watch

    run(calls())
    assert manager.calls == ["continue"]


def test_without_a_limit_the_log_names_it_now_and_then(
    clients: Clients, manager: Manager, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls() -> None:
        manager.pause()
        while clock.now < 100 + 300:
            await yield_once()
        await manager.continue_generation(None)
        assert clients._watch is not None
        await clients._watch

    with caplog.at_level(logging.WARNING):
        run(calls())
    seconds = [record.getMessage().split(" was ")[1].split(" s")[0] for record in caplog.records]
    assert seconds == ["60", "240"]


def test_a_session_that_another_worker_has_ended_is_forgotten(
    clients: Clients, manager: Manager, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls() -> None:
        await clients.call(answered, request("BeginWeightUpdate"), None)
        assert clients._watch is not None
        await clients._watch

    with caplog.at_level(logging.WARNING):
        run(calls())
    assert not caplog.records and clients.reason() is None


@pytest.mark.parametrize(("silent", "destroyed"), [(4, []), (6, ["destroy g"])])
def test_a_new_trainer_replaces_the_group_of_a_silent_one(
    clients: Clients, manager: Manager, clock: Clock, silent: int, destroyed: list[str]
) -> None:
    manager.groups = ["g"]
    clock.now += silent
    run(clients.call(answered, request("InitWeightsUpdateGroup", group_name="g"), 5))
    assert manager.calls == destroyed


# ---- older clients -------------------------------------------------------------------------------

META = {"spec_num_correct_drafts": 3, "spec_num_proposed_drafts": 9}
FORMER = {
    "spec_accept_token_num": 3,
    "spec_accepted_drafts": 3,
    "spec_draft_token_num": 9,
    "spec_proposed_drafts": 9,
}


@pytest.mark.parametrize(
    ("setting", "older", "added"),
    [("auto", False, {}), ("auto", True, FORMER), ("on", False, FORMER), ("off", True, {})],
)
def test_the_former_keys(clients: Clients, setting: Any, older: bool, added: Any) -> None:
    if older:
        clients.note_older()
    meta_info: dict[str, Any] = dict(META)
    clients.add_former_keys(meta_info, Config(older_clients=setting))
    assert meta_info == META | added


def test_former_keys_where_sglang_has_some(clients: Clients) -> None:
    """All of them from the first answer on, with the counts of this step."""
    meta_info: dict[str, Any] = META | {"spec_accepted_drafts": 3, "spec_proposed_drafts": 24}
    clients.add_former_keys(meta_info, Config())
    assert meta_info == META | FORMER


def test_an_update_without_a_session_is_that_of_an_older_client(
    clients: Clients, manager: Manager
) -> None:
    async def opened(_: object) -> Any:
        return [SimpleNamespace(success=True, message=f"Success {SESSION_OPENED}")]

    update = request("UpdateWeightsFromTensor")
    run(clients.call(answered, update, None))
    assert not clients.older
    run(clients.call(opened, update, None))
    assert clients.older


@pytest.mark.parametrize("body", [{}, {"what": "x"}, {"what": "all", "more": 1}])
def test_a_body_that_names_nothing_to_free(body: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        kinds_to_free(body)
    kinds = '"groups", "pause", "session"'
    assert str(error.value) == f'Write {{"what": KIND}}, with one of {kinds} or "all".'


def test_a_body_that_names_something_to_free() -> None:
    assert kinds_to_free({"what": "all"}) == KINDS
    assert kinds_to_free({"what": "pause"}) == ("pause",)


def test_routes_that_only_say_that_they_are_gone_make_room() -> None:
    from fastapi import FastAPI

    app = FastAPI()
    for path in ("/health", *VERSION_PATHS):
        app.get(path)(lambda: None)
    remove_routes(app, VERSION_PATHS)
    paths = [getattr(route, "path", "") for route in app.router.routes]
    assert "/health" in paths
    assert not set(paths) & set(VERSION_PATHS)
