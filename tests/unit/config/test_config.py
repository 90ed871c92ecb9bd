"""The configuration: its defaults, its two sources, and a sentence for everything wrong in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config import settings
from tlt_sglang.config.settings import Config
from tlt_sglang.config.sources import engine_device, from_environment, from_fields, from_file
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import Strategy


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "tlt.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_defaults() -> None:
    assert Config() == Config(strategies=())
    assert Config().strategy is None


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_the_variable_tlt_is_off(value: str | None) -> None:
    assert from_environment({} if value is None else {"TLT_CONFIG": value}) is None


def test_the_real_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLT_CONFIG", '{"strategies": ["off"]}')
    assert from_environment() == Config(("off",))


@pytest.mark.parametrize("config", [Config(), Config(("ngram:8",)), Config(("eagle:3x4x8",))])
def test_inline_json_comes_back_as_it_was(config: Config) -> None:
    assert from_environment({"TLT_CONFIG": config.to_json()}) == config
    assert json.loads(config.to_json()) == {"strategies": list(config.strategies)}


@pytest.mark.parametrize(
    ("text", "strategies"),
    [
        ("", ()),
        ("# nothing", ()),
        ("strategies = []", ()),
        ('strategies = ["ngram:8"]', ("ngram:8",)),
        ('strategies = [" eagle:3x1x4 "]', ("eagle:3x1x4",)),
        ('strategies = "off"', ("off",)),
    ],
)
def test_a_file(tmp_path: Path, text: str, strategies: tuple[str, ...]) -> None:
    path = write(tmp_path, text)
    assert from_file(path) == from_environment({"TLT_CONFIG": str(path)}) == Config(strategies)


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, 'strategies = ["off"]')
    assert from_environment({"TLT_CONFIG": "~/tlt.toml"}) == Config(("off",))


def test_the_strategy() -> None:
    assert Config(("eagle3:3x1x4",)).strategy == Strategy("eagle3", 3, 1, 4)


def test_a_wrong_strategy_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown strategy 'medusa'; write eagle:.* or off\.$"):
        Config(("medusa",))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"strategies": ["ngram:8", "off"]}, "need one kind of drafter, eagle or eagle3, among"),
        ({"strategies": ["eagle:1x1x2", "eagle3:1x1x2"]}, "need one kind of drafter"),
        ({"strategies": ["eagle:1x1x2", "ngram:4", "ngram:8"]}, "only one may be ngram"),
        ({"strategies": ["eagle:1x1x2", "ngram:4"], "max_batch": 4}, "needs off among strategies"),
        ({"strategies": ["eagle:1x1x2"], "max_batch": 4}, "needs off among strategies"),
        ({"max_batch": -1}, "gives -1 as max_batch"),
        ({"max_batch": "4"}, "gives '4' as max_batch"),
        ({"ngram_memory_mb": 0}, "gives 0 as ngram_memory_mb"),
        ({"harvest_gb": -1}, "gives -1 as harvest_gb; write gigabytes, or 0 for no log"),
        ({"harvest_rate": 2}, "gives 2 as harvest_rate; write a fraction from 0 to 1"),
        ({"harvest_rate": True}, "gives True as harvest_rate"),
        ({"store": ""}, "gives '' as store; write the path of a folder"),
        ({"coordinator": 5}, "gives 5 as coordinator; write ipc:///FOLDER/NAME or tcp://"),
        ({"grow": "yes", "store": "s"}, "gives 'yes' as grow; write true or false"),
        ({"grow": True}, "asks to grow a drafter, which needs a store to grow in"),
        ({"log_requests": True}, "asks to log requests, which needs events, the file for them"),
        ({"policy": "best"}, "gives 'best' as policy; choose from cost-model, beg-mab, ema,"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_fields(fields, "tlt.toml")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("strategies", "envelope"),
    [
        (("off", "eagle3:1x1x2", "eagle3:5x1x6"), "eagle3:5x1x6"),
        (("off", "eagle3:5x1x6", "eagle3:3x4x8"), "eagle3:5x4x8"),
        (("eagle:3x1x4", "ngram:8", "off"), "eagle:7x1x8"),
        (("off", "off"), "off"),
    ],
)
def test_buffers_are_for_the_largest(strategies: tuple[str, ...], envelope: str) -> None:
    assert str(Config(strategies).strategy) == envelope


def test_what_is_set_comes_through_the_environment() -> None:
    config = Config(("off", "eagle:1x1x2"), "beg-mab", 4)
    assert from_environment({"TLT_CONFIG": config.to_json()}) == config


@pytest.mark.parametrize("value", ['{"strategies": ', "{}}", "{strategies: 1}", '{"a":' * 100_000])
def test_bad_json(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^TLT_CONFIG holds no valid JSON: .*\.$"):
        from_environment({"TLT_CONFIG": value})


@pytest.mark.parametrize(
    "text",
    ["strategies", "a = 1\na = 2", "strategies = [", "\x00", b"\xff\xfe", "a = " + "[" * 9999],
)
def test_bad_toml(tmp_path: Path, text: str | bytes) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        from_file(path)
    assert str(error.value).startswith(f"The TLT configuration {path} is not valid TOML: ")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no/such/tlt.toml", "No such file or directory"),
        ("/", "Is a directory"),
        ("[]", "No such file or directory"),
        ("x" * 5000, "File name too long"),
        ("tlt\0.toml", "embedded null byte"),
        ("~no-such-user/tlt.toml", "Could not determine home directory"),
    ],
)
def test_a_file_that_cannot_be_read(path: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_environment({"TLT_CONFIG": path})
    assert str(error.value) == (
        f"The TLT configuration {path} cannot be read ({reason}); give TLT_CONFIG or --tlt-config "
        "the path of a TOML file."
    )


@pytest.mark.parametrize("fields", [[], ["ngram:8"], "ngram:8", 1, None])
def test_what_is_no_table(fields: Any) -> None:
    with pytest.raises(ConfigError) as error:
        from_fields(fields, "tlt.toml")
    kind = type(fields).__name__
    assert str(error.value) == f"tlt.toml must hold a table of settings, not a {kind}."


@pytest.mark.parametrize("name", ["strategy", "Strategies", ""])
def test_an_unknown_setting_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_fields({name: []}, "tlt.toml")
    names = ", ".join(field.name for field in dataclasses.fields(Config))
    assert names.startswith("strategies, policy, max_batch")
    assert str(error.value) == f"tlt.toml has the unknown setting {name!r}; known ones: {names}."


@pytest.mark.parametrize("value", [1, None, True, {"a": 1}, [1], [["ngram:8"]], [None]])
def test_strategies_of_a_wrong_type(value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        from_fields({"strategies": value}, "tlt.toml")
    assert str(error.value) == (
        f'tlt.toml gives {value!r} as strategies; write a list of strings, e.g. ["ngram:8"].'
    )


def test_an_error_in_json_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"^The JSON in TLT_CONFIG has the unknown setting 'a';"):
        from_environment({"TLT_CONFIG": '{"a": 1}'})


@pytest.mark.parametrize(
    ("environ", "device"),
    [
        ({}, "cuda"),
        ({"SGLANG_USE_CPU_ENGINE": "0"}, "cuda"),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, "cpu"),
    ],
)
def test_the_device(environ: dict[str, str], device: str) -> None:
    assert engine_device(environ) == device


def test_the_variable() -> None:
    assert settings.VARIABLE == "TLT_CONFIG"
