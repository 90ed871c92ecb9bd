"""The launcher up to where SGLang begins: flags in, SGLang's flags and the environment out."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tlt_sglang import cli, launch_server
from tlt_sglang.config import sglang_flags
from tlt_sglang.config.settings import Config
from tlt_sglang.config.sglang_flags import Flags
from tlt_sglang.errors import EXIT_REPORTED, ConfigError, EnvironmentProblem, FlagError, end_process
from tlt_sglang.launcher import environment, prefork, sglang_server

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 100,
}


@dataclass
class Start:
    """The launch that was prepared."""

    argv: list[str] = field(default_factory=list)
    forked: bool | None = None
    config: str | None = None
    begun: bool = False


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Stop the launcher where SGLang would be imported, on a machine without a GPU."""
    start = Start()

    def run(argv: list[str], forked: bool) -> int:
        start.argv, start.forked = argv, forked
        start.config = os.environ.get("TLT_CONFIG")
        return 0

    monkeypatch.setattr(sglang_server, "run", run)
    monkeypatch.setattr(launch_server, "has_accelerator", lambda: False)
    monkeypatch.setattr(prefork, "begin", lambda: setattr(start, "begun", True))
    monkeypatch.setattr(environment, "require_patchable", lambda device: None)
    names = ("TLT_CONFIG", "TLT_DEBUG", "SGLANG_USE_CPU_ENGINE", "SGLANG_EXTERNAL_MODEL_PACKAGE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    yield start


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*argv: str) -> int:
    return launch_server.main([*argv, "--port", free_port()])


# ---- what reaches SGLang -------------------------------------------------------------------------


def test_without_our_flags_sglang_is_untouched(start: Start, model: str) -> None:
    assert launch("--model", model, "--tp", "2", "--mem-fraction-static=0.5") == 0
    assert start.argv[:-1] == [
        "--model-path",
        model,
        "--device",
        "cpu",
        "--tp",
        "2",
        "--mem-fraction-static=0.5",
        "--port",
    ]
    assert start.forked is False
    assert start.begun is False
    assert start.config is None
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in os.environ


@pytest.mark.parametrize("name", ["--model", "--model-path", "--model=", "--model-path="])
def test_adaptive_spec(start: Start, model: str, name: str) -> None:
    words = [name + model] if name.endswith("=") else [name, model]
    assert launch("--adaptive-spec", *words, "--log-level", "error") == 0
    assert start.argv[:-1] == [
        "--model-path",
        model,
        "--device",
        "cpu",
        "--log-level",
        "error",
        "--port",
    ]
    assert json.loads(start.config or "") == {"strategies": [], "sampling": "coupled"}
    assert start.forked is True
    assert start.begun is True
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "tlt_sglang.models.no_models"


def test_on_a_gpu_nothing_is_forked(
    start: Start, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_server, "has_accelerator", lambda: True)
    assert launch("--model", model, "--adaptive-spec", "--tp", "8") == 0
    assert start.argv[:-1] == ["--model-path", model, "--tp", "8", "--port"]
    assert (start.forked, start.begun) == (False, False)
    assert "SGLANG_USE_CPU_ENGINE" not in os.environ


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device=cpu"]])
def test_cpu_on_a_machine_with_a_gpu(
    start: Start, model: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_server, "has_accelerator", lambda: True)
    assert launch("--model", model, *words) == 0
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1"


@pytest.mark.parametrize(
    ("words", "strategies"),
    [
        (["--adaptive-spec", "--tlt-strategies", "ngram:4"], ["ngram:4"]),
        (["--adaptive-spec", "--tlt-strategies= off "], ["off"]),
        (["--tlt-config", "FILE"], ["ngram:16"]),
        (["--tlt-config", "FILE", "--tlt-strategies", "off"], ["off"]),
        (["--tlt-config", "FILE", "--adaptive-spec"], ["ngram:16"]),
    ],
)
def test_strategies(
    start: Start, model: str, tmp_path: Path, words: list[str], strategies: list[str]
) -> None:
    file = tmp_path / "tlt.toml"
    file.write_text('strategies = ["ngram:16"]')
    assert launch("--model", model, *(str(file) if w == "FILE" else w for w in words)) == 0
    assert json.loads(start.config or "") == {"strategies": strategies, "sampling": "coupled"}


@pytest.mark.parametrize(
    ("words", "strategies"),
    [
        ([], ["ngram:16"]),
        (["--adaptive-spec"], ["ngram:16"]),
        (["--tlt-strategies", "off"], ["off"]),
    ],
)
def test_the_variable_turns_it_on(
    start: Start,
    model: str,
    words: list[str],
    strategies: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TLT_CONFIG", '{"strategies": ["ngram:16"]}')
    assert launch("--model", model, *words) == 0
    assert json.loads(start.config or "") == {"strategies": strategies, "sampling": "coupled"}


def test_the_file_wins_over_the_variable(
    start: Start, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLT_CONFIG", "/no/such/file")
    file = tmp_path / "tlt.toml"
    file.write_text("")
    assert launch("--model", model, "--tlt-config", str(file)) == 0
    assert json.loads(start.config or "") == {"strategies": [], "sampling": "coupled"}


def test_a_model_in_the_home_folder(
    start: Start, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(model).parent))
    assert launch(f"--model=~/{Path(model).name}") == 0
    assert start.argv[:2] == ["--model-path", model]


def test_a_model_on_the_hub(start: Start) -> None:
    assert launch("--model", "org/model", "--adaptive-spec") == 0
    assert start.argv[:2] == ["--model-path", "org/model"]


def test_a_model_without_weights(
    start: Start, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(model) / "model.safetensors").unlink()
    assert launch("--model", model) == 1
    assert capsys.readouterr().err == (
        f"tlt-sglang: The model folder {model!r} has no weights (.safetensors, .bin, .pt, .pth, "
        ".gguf); download them.\n"
    )
    assert launch("--model", model, "--load-format", "dummy") == 0


def test_tlt_serve_is_the_same(start: Start, model: str) -> None:
    assert cli.main(["serve", "--model", model, "--port", free_port()]) == 0
    assert start.argv[:2] == ["--model-path", model]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "Say which model to serve: --model FOLDER, a hub id, or smollm2-135m."),
        (
            ["--model", "MODEL", "--tlt-strategies", "off"],
            "--tlt-strategies has no effect without --adaptive-spec; add it.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--tlt-strategies", "medusa"],
            "Unknown strategy 'medusa'; write eagle:STEPSxTOPKxTOKENS, eagle3:STEPSxTOPKxTOKENS, "
            "ngram:TOKENS or off.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--tlt-strategies", ""],
            "Unknown strategy ''; write eagle:STEPSxTOPKxTOKENS, eagle3:STEPSxTOPKxTOKENS, "
            "ngram:TOKENS or off.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--tlt-strategies", "off,ngram:8"],
            "Several strategies (off, ngram:8) need one kind of drafter, eagle or eagle3, among "
            "them; name one strategy, or add one of a drafter's.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--tlt-strategies", "eagle:3x1x4"],
            "Strategy eagle:3x1x4 needs a drafter: give --speculative-draft-model-path, or use "
            "ngram:8.",
        ),
        (
            ["--model", "MODEL", "--tlt-config", "/no/such.toml"],
            "The TLT configuration /no/such.toml cannot be read (No such file or directory); give "
            "TLT_CONFIG or --tlt-config the path of a TOML file.",
        ),
        (
            ["--model", "/no/such", "--adaptive-spec"],
            "The model '/no/such' does not exist; use a folder or a hub id.",
        ),
        (
            ["--model", "", "--adaptive-spec"],
            "Say which model to serve: --model FOLDER, a hub id, or smollm2-135m.",
        ),
        (
            ["--model", "MODEL", "--device", "cuda"],
            "There is no GPU driver here, so --device cuda cannot run; leave it out to run on CPU.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--pp-size=2"],
            "--pp-size 2 is not served on CPU; start with --pp-size 1, and one server for each "
            "replica.",
        ),
        (
            ["--model", "MODEL", "--adaptive-spec", "--speculative-draft-model", "/no/such"],
            "The drafter '/no/such' does not exist; use a folder or a hub id.",
        ),
    ],
)
def test_one_sentence_and_status_1(
    start: Start,
    model: str,
    words: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch(*(model if word == "MODEL" else word for word in words)) == 1
    assert capsys.readouterr() == ("", f"tlt-sglang: {sentence}\n")
    assert start.argv == []


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model"], "argument --model/--model-path: expected one argument"),
        (["--adaptive-spec=1"], "argument --adaptive-spec: ignored explicit argument '1'"),
        (["--tlt-strategies"], "argument --tlt-strategies: expected one argument"),
        (["--model", "MODEL", "--dtype"], "argument --dtype: expected one argument"),
    ],
)
def test_a_bad_flag_is_status_2(
    start: Start, model: str, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [model if word == "MODEL" else word for word in words]
    assert launch_server.main(argv) == 2
    assert capsys.readouterr() == ("", f"tlt-sglang: Bad flags: {reason}; see --help.\n")


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "80.5", "", "²", "9" * 5000, " 80"])
def test_what_is_no_port(
    start: Start, model: str, port: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch_server.main(["--model", model, f"--port={port}"]) == 2
    sentence = f"--port {port} is not a port; give a number from 1 to 65535."
    assert capsys.readouterr().err == f"tlt-sglang: {sentence}\n"


def test_a_port_in_use(start: Start, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert launch_server.main(["--model", model, f"--port={port}"]) == 1
    assert capsys.readouterr().err == (
        f"tlt-sglang: Port {port} on 127.0.0.1 cannot be used (Address already in use); choose "
        "another with --port or --host, or stop what holds it.\n"
    )


@pytest.mark.parametrize("host", ["256.1.1.1", "no.such.host.invalid", "a..b", "x" * 300])
def test_a_host_that_is_none(
    start: Start, model: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--model", model, "--host", host) == 1
    error = capsys.readouterr().err
    assert error.startswith("tlt-sglang: Port ")
    assert f" on {host} cannot be used (" in error
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLT_DEBUG", "1")
    with pytest.raises(ConfigError):
        launch_server.main([])


@pytest.mark.parametrize("error", [EnvironmentProblem("No room."), KeyboardInterrupt()])
def test_what_ends_it_while_it_runs(
    start: Start,
    model: str,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(argv: list[str], forked: bool) -> int:
        raise error

    monkeypatch.setattr(sglang_server, "run", run)
    interrupted = isinstance(error, KeyboardInterrupt)
    assert launch("--model", model) == (130 if interrupted else 1)
    assert capsys.readouterr().err == ("" if interrupted else "tlt-sglang: No room.\n")


def test_it_takes_no_heavy_import() -> None:
    """A wrong flag is refused before torch and SGLang are imported."""
    program = """
import sys
from tlt_sglang import launch_server
status = launch_server.main(["--model", "org/model", "--adaptive-spec", "--pp-size", "2"])
heavy = {"torch", "transformers", "sglang", "numpy"} & set(sys.modules)
sys.exit(f"{heavy}" if heavy else status)
"""
    environ = {name: value for name, value in os.environ.items() if name != "TLT_CONFIG"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("tlt-sglang: --pp-size 2 is not served on CPU")


# ---- SGLang's flags, read without SGLang ---------------------------------------------------------


def test_defaults_of_the_flags() -> None:
    assert sglang_flags.read([]) == Flags()
    assert (Flags().host, Flags().port) == ("127.0.0.1", "30000")


def test_the_flags_as_sglang_spells_them() -> None:
    words = [
        "--model-path",
        "m",
        "--tensor-parallel-size",
        "2",
        "--page-size=16",
        "--dtype",
        "half",
        "--max-total-tokens",
        "100",
        "--speculative-draft-model",
        "d",
        "--speculative-adaptive",
        "--attention-backend",
        "triton",
        "--speculative-algorithm",
        "EAGLE",
        "--unknown",
        "1",
        "--speculative-num-steps",
        "3",
        "--host",
        "::1",
        "--port",
        "80",
        "--mem-fraction-static",
        "0.5",
    ]
    assert sglang_flags.read(words) == Flags(
        model_path="m",
        tp_size=2,
        page_size=16,
        dtype="half",
        max_total_tokens=100,
        speculative_draft_model_path="d",
        speculative_adaptive=True,
        attention_backend="triton",
        speculative_algorithm="EAGLE",
        speculative_num_steps=3,
        mem_fraction_static=0.5,
        host="::1",
        port="80",
    )


@pytest.mark.parametrize("value", ["two", "1e3", "", "4k", "1.0", "٣", "9" * 30])
def test_numbers_that_are_none_are_left_to_sglang(value: str) -> None:
    assert sglang_flags.read([f"--tp-size={value}", f"--max-total-tokens={value}"]) == Flags()


def test_the_last_of_two_counts() -> None:
    assert sglang_flags.read(["--tp", "2", "--tp-size", "4"]).tp_size == 4
    assert sglang_flags.read(["--max-total-tokens=-3"]).max_total_tokens == -3


def test_a_flag_without_its_value() -> None:
    with pytest.raises(FlagError, match=r"^Bad flags: argument --page-size: expected one argument"):
        sglang_flags.read(["--page-size"])


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--device"], None),
        (["--device", "cpu"], "cpu"),
        (["--device=cpu"], "cpu"),
        (["--device=cpu", "--device", "cuda"], "cuda"),
        (["--devices", "cpu"], None),
    ],
)
def test_one_flags_value(argv: list[str], value: str | None) -> None:
    assert sglang_flags.flag_value(argv, "--device") == value


def test_a_log_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_server, "_model", lambda name, argv: str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    words = ["--model", "m", "--adaptive-spec", "--tlt-store", str(tmp_path / "s"), "--port", "0"]
    monkeypatch.setattr(launch_server, "_check_port", lambda host, port: None)
    assert launch_server.main([*words, "--device", "cpu", "--tlt-harvest-gb", "900000"]) == 1
    assert "has no room for a harvest log of 900000.00 GB" in capsys.readouterr().err


def test_an_engine_process_ends_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        end_process(ConfigError("No."))
    assert end.value.code == EXIT_REPORTED
    assert capsys.readouterr().err == "tlt-sglang: No.\n"


def test_an_error_of_sglangs_is_cut_to_a_sentence() -> None:
    reason = sglang_server._first_sentence

    hint = " (TLT_DEBUG=1 shows the traceback)."
    assert reason(ValueError("Bad.\nLong story")) == f"SGLang did not start: Bad{hint}"
    assert reason(ValueError("One of:\n a,\n b.")) == f"SGLang did not start: One of: a, b{hint}"
    assert reason(ValueError()) == f"SGLang did not start: ValueError{hint}"
    assert reason(RuntimeError("Rank 0 scheduler died during initialization (exit code: -9)")) == (
        "SGLang did not start: the engine process stopped while starting; its message stands above"
        + hint
    )


def test_every_setting_has_a_flag() -> None:
    """The value of each flag arrives in the configuration."""
    values: dict[str, tuple[str | None, object]] = {
        "strategies": ("off,eagle:1x1x2", ("off", "eagle:1x1x2")),
        "policy": ("ema", "ema"),
        "max_batch": ("7", 7),
        "ngram_memory_mb": ("3", 3),
        "draft_dtype": ("float32", "float32"),
        "sampling": ("target", "target"),
        "calibrate": ("off", "off"),
        "pending_memory_mb": ("5", 5),
        "graph_memory_gb": ("1.5", 1.5),
        "older_clients": ("on", "on"),
        "client_timeout_s": ("30", 30.0),
        "events": ("e", "e"),
        "log_requests": (None, True),
        "trace": ("t", "t"),
        "drafter": ("d", "d"),
        "store": ("s", "s"),
        "store_cache": ("c", "c"),
        "grow": (None, True),
        "harvest_gb": ("0.5", 0.5),
        "harvest_rate": ("0.25", 0.25),
        "coordinator": ("tcp://a:1", "tcp://a:1"),
        "coordinator_key": ("k", "k"),
        "device_name": ("gpu0", "gpu0"),
        "preempt_ms": ("300", 300),
        "coordinator_threshold": ("2", 2),
        "coordinator_dwell_ms": ("0", 0),
        "coordinator_timeout_ms": ("900", 900),
        "sidecar": ("idle", "idle"),
        "sidecar_memory_gb": ("0.5", 0.5),
        "sidecar_threads": ("2", 2),
        "sidecar_cores": ("0,1", (0, 1)),
        "sidecar_learning_rate": ("2e-3", 2e-3),
        "sidecar_batch_tokens": ("128", 128),
        "sidecar_gate_steps": ("3", 3),
        "sidecar_seed": ("4", 4),
        "sidecar_tensorboard": (None, True),
    }
    assert set(values) == {field.name for field in dataclasses.fields(Config)}
    words = ["--model", "m", "--adaptive-spec"]
    for name, (text, _) in values.items():
        words += ["--tlt-" + name.replace("_", "-"), *([] if text is None else [text])]
    config = launch_server._config(launch_server._parser().parse_args(words))
    assert dataclasses.asdict(config or Config()) == {name: v for name, (_, v) in values.items()}
