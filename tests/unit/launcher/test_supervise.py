"""The launcher's sidecar: what its flags mean, and that it is kept running until the end."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config.config import Config
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.launcher import supervise


def given(**flags: Any) -> argparse.Namespace:
    names = (
        "sidecar",
        "preempt_ms",
        "sidecar_memory_gb",
        "sidecar_threads",
        "sidecar_cores",
        "sidecar_tensorboard",
    )
    return argparse.Namespace(**{f"tlt_{name}": flags.get(name) for name in names})


def test_without_the_flag_there_is_none() -> None:
    assert supervise.options(given(), Config()) is None


def test_an_idle_sidecar_gets_a_coordinator_of_its_own(tmp_path: Path) -> None:
    config = Config(store=str(tmp_path))
    sidecar = supervise.options(given(sidecar="idle", preempt_ms=300), config)
    assert sidecar is not None and sidecar.endpoint is not None
    assert sidecar.preempt_ms == 300
    joined = sidecar.joined(config)
    assert joined.coordinator == sidecar.endpoint
    words = sidecar.command(joined)
    assert words[words.index("--tlt-coordinator") + 1] == sidecar.endpoint
    assert words[words.index("--parent") + 1] == str(os.getpid())


def test_one_that_always_trains_asks_nobody(tmp_path: Path) -> None:
    config = Config(store=str(tmp_path), coordinator="ipc:///tmp/x/y")
    flags = given(sidecar="always", sidecar_cores="1", sidecar_tensorboard=True)
    sidecar = supervise.options(flags, config)
    assert sidecar is not None
    words = sidecar.command(sidecar.joined(config))
    assert "--tensorboard" in words
    assert "--tlt-coordinator" not in words
    assert words[words.index("--cores") + 1] == "1"


def test_another_coordinator_is_used_where_one_is_named(tmp_path: Path) -> None:
    config = Config(store=str(tmp_path), coordinator="ipc:///tmp/x/y", device_name="gpu0")
    sidecar = supervise.options(given(sidecar="idle"), config)
    assert sidecar is not None and sidecar.endpoint is None
    words = sidecar.command(sidecar.joined(config))
    assert "ipc:///tmp/x/y" in words and "gpu0" in words


@pytest.mark.parametrize(
    ("flags", "config", "says"),
    [
        ({"sidecar_threads": 2}, Config(store="s"), "no effect without --tlt-sidecar"),
        ({"sidecar": "idle"}, Config(), "give --tlt-store"),
        ({"sidecar": "idle"}, None, "give --tlt-store"),
        ({"sidecar": "idle"}, Config(store="s", harvest_gb=0.0), "nothing to learn from"),
    ],
)
def test_what_cannot_be(flags: dict[str, Any], config: Config | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        supervise.options(given(**flags), config)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = Config(store=str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem, match="The drafter store"):
        supervise.options(given(sidecar="always"), config)


def test_it_is_started_again_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "AGAIN_SECONDS", (0.01,))
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
    config = Config(store=str(tmp_path))
    sidecar = supervise.options(given(sidecar="idle"), config)
    assert sidecar is not None
    changed = dataclasses.replace(sidecar.joined(config), coordinator=None)
    assert changed == config
