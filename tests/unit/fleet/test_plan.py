"""The plan of a fleet: its members, what they take, and commands that their programs understand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tlt_sglang.config import command_line, flags
from tlt_sglang.config.settings import settings_for
from tlt_sglang.errors import ConfigError
from tlt_sglang.fleet.plan import CACHE, Member, Plan, Size
from tlt_sglang.launch_server import _parser

PLAN = Plan(
    "tlt",
    Path("/shared/store"),
    "model",
    engines=2,
    trainers=1,
    engine=Size(4, 2),
    engine_flags=("--tp", "2"),
    trainer_flags=("--tlt-sidecar-threads", "3"),
)


def test_each_member_has_a_bundle_of_its_size() -> None:
    assert [member.name for member in PLAN.placed()] == ["engine-0", "engine-1", "trainer-0"]
    assert PLAN.bundles() == [{"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 2}, {"CPU": 1}]


def test_names_differ() -> None:
    members = [
        *PLAN.placed(),
        Member("coordinator"),
        Member("exporter", "ab"),
        Member("exporter", "cd"),
    ]
    assert len({PLAN.actor(member.name) for member in members}) == len(members)


def test_an_engine_reports_to_the_coordinator_as_a_device_of_its_own() -> None:
    command = PLAN.command(Member("engine", "1"), "10.0.0.2", 8000)
    args, rest = _parser().parse_known_args(command[3:])
    assert args.adaptive_spec and args.model == "model"
    key = ["--config", "/shared/store/fleet/keys/engine.yaml"]
    assert rest == ["--host", "10.0.0.2", "--port", "8000", "--enable-metrics", *key, "--tp", "2"]
    values = flags.flag_values(args)
    assert values == {
        "store": "/shared/store",
        "store_cache": CACHE,
        "coordinator": "file:///shared/store/fleet/coordinator",
        "coordinator_key": "/shared/store/fleet/keys/coordinator.key",
        "device_name": "tlt/engine-1",
    }


@pytest.mark.parametrize("flag", ["--api-key=x", "--admin-api-key", "--config"])
def test_an_engine_with_a_key_of_its_own_keeps_it(flag: str) -> None:
    plan = replace(PLAN, engine_flags=(flag, "x"))
    assert str(plan.engine_config) not in plan.command(Member("engine", "1"), "10.0.0.2", 8000)


def test_an_engine_may_be_open_to_everybody() -> None:
    plan = replace(PLAN, protected=False)
    assert "--config" not in plan.command(Member("engine", "1"), "10.0.0.2", 8000)


def test_a_trainer_has_a_device_of_its_own_and_asks_nobody() -> None:
    parser = command_line.Parser("tlt sidecar")
    flags.add_flags(parser, settings_for("sidecar"))
    values = flags.flag_values(parser.parse_args(PLAN.command(Member("trainer", "0"), "", 0)[4:]))
    assert values == {
        "store": "/shared/store",
        "coordinator_key": "/shared/store/fleet/keys/coordinator.key",
        "sidecar_threads": 3,
    }


@pytest.mark.parametrize(
    ("member", "command"),
    [
        (Member("coordinator"), ["coordinator", "--tlt-coordinator", "tcp://10.0.0.3:9000"]),
        (
            Member("exporter", "ab"),
            ["export", "--tlt-store", "/shared/store", "--address", "tcp://10.0.0.3:9000"],
        ),
    ],
)
def test_who_listens_has_the_secret_key(member: Member, command: list[str]) -> None:
    key = ["--tlt-coordinator-key", "/shared/store/fleet/keys/coordinator.key_secret"]
    assert PLAN.command(member, "10.0.0.3", 9000)[3:] == command + key


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = replace(PLAN, store=tmp_path)
    assert Plan.read(tmp_path) is None
    plan.folder.mkdir()
    (plan.folder / "plan.json").write_bytes(plan.to_json())
    assert Plan.read(tmp_path) == plan


@pytest.mark.parametrize("text", [b"", b"\xff", b"{}", b'{"name": 1}'])
def test_a_plan_that_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "plan.json").write_bytes(text)
    with pytest.raises(ConfigError, match="cannot be read; remove it"):
        Plan.read(tmp_path)
