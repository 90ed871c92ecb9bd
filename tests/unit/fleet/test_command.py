"""`tlt fleet` says in one sentence what is wrong, before it starts anything."""

from __future__ import annotations

import builtins
import contextlib
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.fleet import commands
from tlt_sglang.fleet.commands import main
from tlt_sglang.fleet.plan import Plan


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "needs a store"),
        (["--tlt-store", "STORE"], 2, "--model MODEL; or give --engines 0"),
        (["--tlt-store", "STORE", "--engines", "-1"], 2, "is not a whole number"),
        (["--tlt-store", "STORE", "--engine-cpus", "-1"], 2, "--model"),
        (["--tlt-store", "STORE", "--engines", "0", "--trainer-gpus", "-1"], 2, "from 0 on"),
        (["--tlt-store", "STORE", "--engines", "0", "--engine-cpus", "nan"], 2, "from 0 on"),
        (
            ["--tlt-store", "STORE", "--engines", "0", "--detach", "--local-nodes", "2"],
            2,
            "--detach has no effect",
        ),
        (["--tlt-store", "STORE", "--status"], 1, "No fleet was started with the store"),
        (["--tlt-store", "STORE", "--stop"], 1, "No fleet was started with the store"),
        (["--unknown"], 2, "unrecognized arguments"),
    ],
)
def test_what_is_wrong(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "store"
    assert main([str(store) if word == "STORE" else word for word in words]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("tlt fleet: ")
    assert not store.exists()


def test_trainers_and_engines_have_their_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(commands, "_connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(commands, "_run", lambda plan, detach: plans.append(plan))
    words = ["--tlt-store", str(tmp_path), "--model", "m", "--tlt-sidecar-batch-tokens", "512"]
    assert main([*words, "--tlt-sidecar-seed", "0", "--", "--tp-size", "2"]) == 0
    assert plans[0].trainer_flags == ("--tlt-sidecar-batch-tokens", "512")
    assert plans[0].engine_flags == ("--tp-size", "2")


def test_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["--tlt-store", str(tmp_path / "store"), "--engines", "0"]) == 1
    assert "pip install 'tlt-sglang[fleet]'" in capsys.readouterr().err


def test_a_cluster_that_cannot_be_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--tlt-store", str(tmp_path / "store"), "--engines", "0", "--ray", "127.0.0.1:1"]
    assert main(words) == 1
    assert "No Ray cluster could be reached" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--local-nodes" in capsys.readouterr().out
