"""Flags generated from the settings: what they accept, refuse, and pass on to other processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import SETTINGS, Config, settings_for
from tlt_sglang.config.sources import from_fields
from tlt_sglang.coordinator.commands import rules
from tlt_sglang.coordinator.world import Rules
from tlt_sglang.errors import ConfigError, FlagError
from tlt_sglang.sidecar import service


def config_of(*words: str) -> Config:
    """The configuration that `words` describe, on top of the defaults."""
    parser = Parser("test")
    flags.add_flags(parser, SETTINGS.values())
    flags.add_config_flag(parser)
    args = parser.parse_args(list(words))
    return flags.with_flags(flags.base_config(args) or Config(), flags.flag_values(args))


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLT_CONFIG", raising=False)


def test_without_flags_the_defaults() -> None:
    assert config_of() == Config()


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tlt.toml"
    file.write_text('sidecar_threads = 3\nsidecar_seed = 5\nsidecar_cores = [0, 1]\nstore = "s"')
    config = config_of("--tlt-config", str(file), "--tlt-sidecar-threads", "2")
    expected = Config(store="s", sidecar_threads=2, sidecar_seed=5, sidecar_cores=(0, 1))
    assert config == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tlt-ngram-memory-mb", "0"], "--tlt-ngram-memory-mb 0 is not valid; write 1 or more."),
        (
            ["--tlt-harvest-rate", "2"],
            "--tlt-harvest-rate 2 is not valid; write a fraction from 0 to 1.",
        ),
        (["--tlt-events", ""], "--tlt-events '' is not valid; write the path of a file."),
        (
            ["--tlt-sidecar-memory-gb", "0"],
            "--tlt-sidecar-memory-gb 0 is not valid; write more than 0 gigabytes.",
        ),
        (
            ["--tlt-preempt-ms", "0"],
            "--tlt-preempt-ms 0 is not valid; write 1 or more milliseconds.",
        ),
        (
            ["--tlt-harvest-gb", "nan"],
            "--tlt-harvest-gb nan is not valid; write gigabytes, or 0 for no log.",
        ),
        (
            ["--tlt-sidecar-cores", "0,-1"],
            "--tlt-sidecar-cores 0,-1 is not valid; write a list of core numbers, e.g. [0, 1].",
        ),
        (
            ["--tlt-grow"],
            "The command line asks to grow a drafter, which needs a store to grow in.",
        ),
    ],
)
def test_a_value_out_of_range(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(*words)
    assert str(error.value) == sentence
    assert not isinstance(error.value, FlagError)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["--tlt-max-batch", "two"],
            "argument --tlt-max-batch: 'two' is not a whole number",
        ),
        (["--tlt-harvest-gb", "much"], "argument --tlt-harvest-gb: 'much' is not a number"),
        (["--tlt-sidecar-cores", "a"], "argument --tlt-sidecar-cores: 'a' is not a whole number"),
        (["--tlt-policy", "best"], "argument --tlt-policy: invalid choice: 'best' (choose from"),
    ],
)
def test_a_value_that_cannot_be_read(words: list[str], reason: str) -> None:
    with pytest.raises(FlagError) as error:
        config_of(*words)
    assert str(error.value).startswith(f"Bad flags: {reason}")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sidecar": "sometimes"}, "gives 'sometimes' as sidecar; choose from idle, always."),
        ({"sidecar_threads": 0}, "gives 0 as sidecar_threads; write 1 or more."),
        ({"sidecar_memory_gb": 0}, "gives 0 as sidecar_memory_gb; write more than 0 gigabytes."),
        ({"sidecar_cores": "0"}, "gives '0' as sidecar_cores; write a list of core numbers"),
        ({"sidecar_cores": [True]}, "gives [True] as sidecar_cores"),
        ({"sidecar_tensorboard": 1}, "gives 1 as sidecar_tensorboard; write true or false."),
        ({"sidecar_learning_rate": 0}, "write a number greater than 0."),
        ({"coordinator_threshold": -1}, "gives -1 as coordinator_threshold; write a number of"),
        ({"coordinator_dwell_ms": 0.5}, "gives 0.5 as coordinator_dwell_ms; write milliseconds."),
        ({"preempt_ms": "500"}, "gives '500' as preempt_ms; write 1 or more milliseconds."),
        ({"draft_dtype": "int8"}, "gives 'int8' as draft_dtype; choose from auto, float32."),
        ({"graph_memory_gb": 0}, "gives 0 as graph_memory_gb; write gigabytes."),
    ],
)
def test_a_bad_value_in_a_file(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_fields(fields, "tlt.toml")
    assert str(error.value).startswith("tlt.toml ")
    assert says in str(error.value)


def test_other_processes_get_what_differs_from_the_defaults() -> None:
    config = Config(
        ("off",),
        store="~/drafters",
        grow=True,
        sidecar_memory_gb=0.3,
        sidecar_learning_rate=1.23456789e-3,
        sidecar_cores=(0, 2),
        sidecar_tensorboard=True,
    )
    words = flags.to_flags(config, SETTINGS.values())
    assert config_of(*words) == config
    assert flags.to_flags(Config(), SETTINGS.values()) == []
    assert "--tlt-grow" not in flags.to_flags(config, settings_for("sidecar"))


def test_help_stands_alone() -> None:
    """Every flag's help is a phrase with a capital and without a full stop."""
    for setting in SETTINGS.values():
        assert setting.help[0].isupper() and not setting.help.endswith("."), setting.name
        assert setting.default_text, setting.name
        assert setting.flag_help.endswith(f"(default: {setting.default_text})"), setting.name


# ---- the sidecar and the coordinator -------------------------------------------------------------


def test_defaults_are_those_of_the_programs() -> None:
    from tlt_sglang.sidecar.learner_settings import LearnerSettings

    assert rules(Config()) == Rules()
    assert Config().sidecar_learning_rate == LearnerSettings().learning_rate
    assert Config().sidecar_batch_tokens == LearnerSettings().batch_tokens
    assert Config().sidecar_gate_steps == LearnerSettings().gate_steps
    assert Config().sidecar_seed == LearnerSettings().seed


def test_the_sidecar_reads_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "tlt.toml"
    file.write_text('strategies = ["off"]\nstore = "~/s"\ncoordinator = "ipc:///tmp/x/y"')
    options = service._options(config_of("--tlt-config", str(file)), None)
    assert options.store == Path("~/s").expanduser()
    assert options.coordinator == "ipc:///tmp/x/y"
    always = config_of("--tlt-config", str(file), "--tlt-sidecar", "always")
    assert service._options(always, None).coordinator is None


def test_a_sidecar_without_a_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert service.main([]) == 2
    assert capsys.readouterr().err == (
        "tlt sidecar: The sidecar needs a store to publish to; give --tlt-store DIR.\n"
    )


def test_a_core_that_is_not_available(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert service.main(["--tlt-store", "s", "--tlt-sidecar-cores", "1,9"]) == 1
    assert capsys.readouterr().err == (
        "tlt sidecar: --tlt-sidecar-cores 9 is not available; this process may use the cores "
        "0, 1.\n"
    )
