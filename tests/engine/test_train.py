"""`tlt data` and `tlt train` as a user runs them, on a tiny target, and served afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import bench_drafter
from tests.support.launching import Done, run
from tests.support.prompts import tokenizer
from tests.support.servers import Servers
from tests.support.tiny import make_target
from tlt_sglang.training import commands, prompts

Refused = Callable[..., str]
TLT = [sys.executable, "-m", "tlt_sglang.cli"]
PROMPTS = [
    {"prompt": f"Count from {n} to {n + 5}:", "response": f" {n}, {n + 1}, {n + 2}, {n + 3}"}
    for n in range(40)
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target with the default model's tokenizer."""
    folder = make_target(tmp_path_factory.mktemp("train") / "target", "llama", 49152)
    tokenizer().save_pretrained(folder)
    return folder


def data(folder: Path, *lines: object) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines or PROMPTS))
    return str(path)


def train(target: Path, folder: Path, *flags: str) -> Done:
    words = ["train", "--model", str(target), "--out", str(folder / "out")]
    return run([*TLT, *words, "--data", str(folder / "data.jsonl"), *flags])


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run `tlt train` in this process; the one sentence with which it refuses."""

    def call(target: Path, folder: Path, *flags: str) -> str:
        words = ["train", "--model", str(target), "--out", str(folder / "out")]
        capfd.readouterr()
        assert commands.main([*words, "--data", str(folder / "data.jsonl"), *flags]) in (1, 2)
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert not (folder / "out" / "work" / "checkpoints").exists() or "another" in err
        return err

    return call


QUICK = ("--epochs", "2", "--batch-tokens", "128", "--draft-vocab", "512")


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle"])
def test_from_responses_to_a_drafter(
    target: Path, tmp_path: Path, algorithm: str, refused: Refused
) -> None:
    data(tmp_path)
    done = train(target, tmp_path, "--algorithm", algorithm, *QUICK)
    assert done.status == 0, done.err
    out = Path(done.out.strip())
    assert {"config.json", "model.safetensors", "training.json"} <= set(os.listdir(out))
    report = json.loads((out / "training.json").read_text())
    assert report["curve"][-1]["step"] > 3
    assert all(length >= 1 for length in report["accept_length"].values())
    # Other options are another run.
    other = refused(target, tmp_path, "--algorithm", algorithm, *QUICK, "--seed", "3")
    assert "holds a run with another settings" in other


def test_an_interrupted_run_goes_on(target: Path, tmp_path: Path) -> None:
    data(tmp_path)
    words = ["train", "--model", str(target), "--out", str(tmp_path / "out"), "--minutes", "5"]
    words += ["--data", str(tmp_path / "data.jsonl"), "--batch-tokens", "128"]
    process = subprocess.Popen([*TLT, *words], stderr=subprocess.PIPE, text=True)
    features = tmp_path / "out" / "work" / "features"
    deadline = time.monotonic() + 120
    while not list(features.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "tlt train: interrupted; start it again to go on."
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert list((tmp_path / "out" / "work" / "checkpoints").glob("step-*"))


def test_two_processes(target: Path, tmp_path: Path) -> None:
    """FSDP2 over gloo: the run ends, and every process's batches have moved the weights."""
    data(tmp_path)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tlt_sglang.cli"]
    words += ["train", "--model", str(target), "--out", str(tmp_path / "out"), *QUICK]
    done = run([sys.executable, *words, "--data", str(tmp_path / "data.jsonl")])
    assert done.status == 0, done.err
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights.values())
    # One process reads what two have written, finds nothing left to do, and exports the same.
    alone = train(target, tmp_path, *QUICK)
    assert alone.status == 0, alone.err
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_server_takes_it(servers: Servers, target: Path, tmp_path: Path) -> None:
    """With no further flag; and the target's answers are what it was trained on."""
    path = data(tmp_path, *({"prompt": f"{n} and {n}"} for n in range(6)))
    done = train(target, tmp_path, "--max-new-tokens", "12", "--at-once", "4", *QUICK)
    assert done.status == 0, done.err
    lines = (tmp_path / "out" / "work" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert {json.loads(line)["temperature"] for line in lines} == {0.0, 1.0}
    server = servers.get(None, "--adaptive-spec", model=str(target), drafter=done.out.strip())
    assert "eagle3:3x1x4" in server.status()["schedulers"][0]["strategies"]
    greedy = next(json.loads(line) for line in lines if json.loads(line)["temperature"] == 0.0)
    answer = server.generate(greedy["prompt"]["ids"], 12, ignore_eos=False)
    assert answer["output_ids"] == greedy["output"]
    servers.drop(server)
    assert Path(path).exists()


BAD = {
    "no file": ((), "cannot be read"),
    "nothing": (([],), "Line 1 of"),
    "one prompt": (({"prompt": "a", "response": "b c d"},), "The data has one prompt"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_data(target: Path, tmp_path: Path, what: str, refused: Refused) -> None:
    lines, says = BAD[what]
    if lines:
        data(tmp_path, *lines)
    assert says in refused(target, tmp_path, *QUICK)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_targets(tmp_path: Path, refused: Refused) -> None:
    data(tmp_path)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "the target is GPT2LMHeadModel" in refused(tmp_path / "gpt", tmp_path)


def test_bad_flags(tmp_path: Path, refused: Refused) -> None:
    for flags, says in (
        (["--minutes", "0"], "--minutes must be greater than 0, not 0."),
        (["--temperatures", "hot"], "is not a list of temperatures; write a list such as 0,1."),
        (["--epochs", "none"], "Bad flags: argument --epochs"),
    ):
        assert says in refused(tmp_path, tmp_path, *flags)


def test_problems_of_the_benchmark_are_not_those_of_training() -> None:
    requested = bench_drafter.problems(6)
    assert len(set(requested)) == 6
    assert max(map(len, requested)) <= bench_drafter.LONGEST_PROBLEM
    assert bench_drafter.problems(6) == requested
    assert prompts.TRAINING_SEEDS > 1000 * bench_drafter.EVALUATION_SEED
    learned = set(prompts.reasoning(200, prompts.TRAINING_SEEDS))
    assert not learned & set(requested)
