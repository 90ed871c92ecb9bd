"""The launcher's sidecar: what its flags mean, and that it is kept running until the end."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from tlt_sglang.config.settings import Config
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.launcher import supervise


def test_without_the_flag_there_is_none() -> None:
    assert supervise.options(Config()) is None


def test_an_idle_sidecar_gets_a_coordinator_of_its_own(tmp_path: Path) -> None:
    config = Config(store=str(tmp_path), sidecar="idle", preempt_ms=300)
    sidecar = supervise.options(config)
    assert sidecar is not None and sidecar.endpoint is not None
    joined = sidecar.joined(config)
    assert joined.coordinator == sidecar.endpoint
    words = sidecar.command(joined)
    assert words[words.index("--tlt-coordinator") + 1] == sidecar.endpoint
    assert words[words.index("--parent") + 1] == str(os.getpid())
    assert words[words.index("--tlt-preempt-ms") + 1] == "300"


def test_one_that_always_trains_asks_nobody(tmp_path: Path) -> None:
    config = Config(
        store=str(tmp_path),
        coordinator="ipc:///tmp/x/y",
        sidecar="always",
        sidecar_cores=(1,),
        sidecar_tensorboard=True,
    )
    sidecar = supervise.options(config)
    assert sidecar is not None
    words = sidecar.command(sidecar.joined(config))
    assert "--tlt-sidecar-tensorboard" in words
    assert "--tlt-coordinator" not in words
    assert words[words.index("--tlt-sidecar-cores") + 1] == "1"


def test_another_coordinator_is_used_where_one_is_named(tmp_path: Path) -> None:
    config = Config(
        store=str(tmp_path), coordinator="ipc:///tmp/x/y", device_name="gpu0", sidecar="idle"
    )
    sidecar = supervise.options(config)
    assert sidecar is not None and sidecar.endpoint is None
    words = sidecar.command(sidecar.joined(config))
    assert "ipc:///tmp/x/y" in words and "gpu0" in words


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        (Config(store="s"), ["sidecar_threads"], "no effect without --tlt-sidecar"),
        (None, ["sidecar_threads"], "no effect without --tlt-sidecar"),
        (Config(sidecar="idle"), ["sidecar"], "give --tlt-store"),
        (Config(store="s", harvest_gb=0.0, sidecar="idle"), [], "nothing to learn from"),
    ],
)
def test_what_cannot_be(config: Config | None, flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        supervise.options(config, flags)


def test_a_file_may_hold_settings_of_a_sidecar_that_runs_elsewhere() -> None:
    assert supervise.options(Config(store="s", sidecar_threads=2), ["store"]) is None


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Config(store=str(tmp_path / "file"), sidecar="always")
    with pytest.raises(EnvironmentProblem, match="The drafter store"):
        supervise.options(config)


def test_it_is_started_again_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "RESTART_SECONDS", (0.01,))
    starts = tmp_path / "starts"
    body = f"""if True:
        import os, time
        with open({str(starts)!r}, "a") as file: file.write(str(os.getpid()) + "\\n")
        if len(open({str(starts)!r}).readlines()) == 3: time.sleep(60)
        raise SystemExit(1)"""
    stop = threading.Event()
    thread = threading.Thread(target=supervise._keep, args=([sys.executable, "-c", body], stop))
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if starts.exists() and len(starts.read_text().split()) == 3:
            break
        time.sleep(0.02)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    pids = starts.read_text().split()
    assert len(pids) == 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_server_without_a_sidecar_runs_nothing() -> None:
    with supervise.running(None, Config()):
        assert not supervise._threads


def test_what_is_joined_is_a_configuration(tmp_path: Path) -> None:
    config = Config(store=str(tmp_path), sidecar="idle")
    sidecar = supervise.options(config)
    assert sidecar is not None
    changed = dataclasses.replace(sidecar.joined(config), coordinator=None)
    assert changed == config
