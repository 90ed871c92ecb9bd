"""Clients that die halfway, and clients that were written for an older SGLang."""

from __future__ import annotations

import time
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file

from tests.engine.test_weights import SESSIONS, load, needs_sessions, share_through_files
from tests.support.dying_client import kill_at
from tests.support.servers import MODEL, Server, Servers, model_folder
from tests.support.trainer import trainer
from tests.support.update_group import GROUP
from tlt_sglang.engine.clients import BUSY_SECONDS
from tlt_sglang.launcher.child_process import wait_for

pytestmark = pytest.mark.usefixtures("share_through_files")
__all__ = ["share_through_files"]

PROMPT = list(range(40, 60))
NORM = "model.norm.weight"
LIMIT = 8
SECONDS = 60.0


@pytest.fixture
def server(servers: Servers) -> Server:
    """A server without a time limit, whose health check fails after two seconds."""
    return servers.get("ngram:4", environment={"SGLANG_HEALTH_CHECK_TIMEOUT": "2"})


@pytest.fixture
def limited(servers: Servers) -> Server:
    """A server with a time limit for silent clients."""
    flags = ("--tlt-client-timeout-s", str(LIMIT), "--tlt-older-clients", "on")
    return servers.get("ngram:4", *flags)


@pytest.fixture(scope="module")
def norm() -> dict[str, torch.Tensor]:
    """A tensor of the model, as it is."""
    return {NORM: load_file(model_folder(MODEL) / "model.safetensors")[NORM]}


def waits_for(server: Server) -> list[str]:
    """Return what the main process says that the server waits for."""
    return [row["what"] for row in server.status()["clients"]["waits_for"]]


def updates(server: Server) -> dict[str, Any]:
    """Return what the scheduler says of weight updates."""
    state: dict[str, Any] = server.scheduler()["weight_updates"]
    return state


def works(server: Server, norm: dict[str, torch.Tensor]) -> None:
    """Form a group with the server, update its weights in it, and generate."""
    with trainer(server) as client:
        assert client.send(norm)["success"]
    assert len(server.generate(PROMPT, 8)["output_ids"]) == 8


def check_503(server: Server, path: str) -> str:
    """Return the body of a health check, which fails."""
    response = server.request("GET", path)
    assert response.status_code == 503
    return response.text


# ---- killed with SIGKILL -------------------------------------------------------------------------


def test_killed_between_pause_and_continue(server: Server, norm: dict[str, torch.Tensor]) -> None:
    kill_at(server.port, "pause")
    assert waits_for(server) == ["pause"]
    reason = "The engine waits for /continue_generation; its client's last call was "
    assert server.status()["clients"]["reason"].startswith(reason)
    assert check_503(server, "/health").startswith(reason)
    if server.request("GET", "/ready").status_code != 404:  # newer versions have it
        assert check_503(server, "/ready").startswith(reason)
    assert server.post("/tlt/free", {"what": "pause"}) == {"freed": ["pause"]}
    assert waits_for(server) == []
    works(server, norm)
    assert server.healthy()
    assert "Freed what a client has left open: pause." in server.log()


@needs_sessions
def test_killed_in_a_session(server: Server, norm: dict[str, torch.Tensor]) -> None:
    kill_at(server.port, "session")
    assert waits_for(server) == ["session"] and updates(server)["session"] == "all"
    with pytest.raises(requests.HTTPError, match="a weight-update session is already open"):
        server.post("/begin_weight_update", {})
    assert server.post("/tlt/free", {"what": "all"}) == {"freed": ["session"]}
    assert waits_for(server) == [] and updates(server)["session"] is None
    works(server, norm)
    assert "the weights may be those of two versions" in server.log()


def test_killed_in_a_process_group(server: Server, norm: dict[str, torch.Tensor]) -> None:
    """The broadcast that it owes fails, and the group is left."""
    kill_at(server.port, "group")
    assert wait_for(lambda: not server.status()["clients"]["waits_for"], SECONDS)
    assert updates(server)["process_groups"] == [GROUP]
    assert server.post("/tlt/free", {"what": "groups"}) == {"freed": [f"group {GROUP}"]}
    assert updates(server)["process_groups"] == []
    works(server, norm)


@pytest.mark.parametrize(
    "stage", ["pause", pytest.param("session", marks=needs_sessions), "group", "init"]
)
def test_a_time_limit_frees_the_engine(
    limited: Server, norm: dict[str, torch.Tensor], stage: str
) -> None:
    """The next trainer needs no command. Before a group is formed, the scheduler is blocked."""
    kill_at(limited.port, stage)
    if stage == "init":
        time.sleep(BUSY_SECONDS)
        assert waits_for(limited) == ["call"]
    assert wait_for(lambda: not limited.status()["clients"]["waits_for"], SECONDS)
    if stage == "group":
        time.sleep(LIMIT)  # the group stays until another one of its name is formed
    works(limited, norm)
    assert updates(limited)["process_groups"] == []


def test_nothing_to_free(server: Server) -> None:
    assert server.post("/tlt/free", {"what": "all"}) == {"freed": []}
    with pytest.raises(requests.HTTPError, match=r'400 .*Write {\\"what\\": KIND}'):
        server.post("/tlt/free", {"what": "everything"})


# ---- older clients -------------------------------------------------------------------------------

FORMER = {
    "spec_accept_token_num": "spec_num_correct_drafts",
    "spec_draft_token_num": "spec_num_proposed_drafts",
    "spec_accepted_drafts": "spec_num_correct_drafts",
    "spec_proposed_drafts": "spec_num_proposed_drafts",
}


def test_the_first_call_of_an_older_client_begins_its_service(
    servers: Servers, norm: dict[str, torch.Tensor]
) -> None:
    """Where SGLang has no sessions, all clients are older ones, and the keys are there at once."""
    server = servers.get("ngram:4", "--tlt-older-clients", "auto")
    prompt = PROMPT * 3
    keys = server.generate(prompt)["meta_info"].keys()
    assert FORMER.keys() & keys == (set() if SESSIONS else FORMER.keys())
    assert server.status()["clients"]["older"] is False
    answer = load(server, norm, weight_version="7", disable_draft_model=True)
    opened = "TLT opened a weight-update session for this update." in answer["message"]
    assert opened == server.status()["clients"]["older"] == SESSIONS
    assert updates(server)["opened_sessions"] == int(SESSIONS)
    meta_info = server.generate(prompt)["meta_info"]
    for former, present in FORMER.items():
        assert meta_info[former] == meta_info[present]
    assert meta_info["spec_accept_histogram"] == meta_info["spec_correct_drafts_histogram"]
    for path in ("/get_weight_version", "/weight_version"):
        assert server.get(path) == server.post(path) == {"weight_version": "7"}
    servers.drop(server)


def test_keys_from_the_first_answer_on(limited: Server) -> None:
    assert FORMER.keys() <= limited.generate(PROMPT * 3)["meta_info"].keys()


@needs_sessions
def test_without_service_for_older_clients(servers: Servers, norm: dict[str, torch.Tensor]) -> None:
    server = servers.get("ngram:4", "--tlt-older-clients", "off")
    with pytest.raises(requests.HTTPError, match="must run between"):
        load(server, norm)
    with pytest.raises(requests.HTTPError, match="404"):
        server.get("/get_weight_version")
    servers.drop(server)
