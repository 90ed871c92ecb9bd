"""`python -m tlt_sglang.launch_server`: SGLang's server, with TLT's flags in front.

Reads our flags, leaves every other one to SGLang, checks what can be checked before anything heavy
is imported, then starts SGLang's own server in this process. Without `--adaptive-spec` SGLang runs
untouched. A problem ends it with one sentence and exit status 1 (2 for a bad flag), and nothing it
started stays behind.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlt_sglang.config import config as configuration
from tlt_sglang.config import flags
from tlt_sglang.config.config import Config, Device
from tlt_sglang.errors import SPOKEN, ConfigError, EnvironmentProblem, FlagError, TltError
from tlt_sglang.harvest import segments
from tlt_sglang.launcher import leftovers, prefork, supervise
from tlt_sglang.models import seed

_SPECULATION = (
    "--speculative-draft-model-path",
    "--speculative-draft-model",
    "--speculative-algorithm",
)
"""Flags of SGLang that say what is to draft."""
STAND_IN = Path(__file__).parent / "cpu" / "stand_in"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the process's exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(flag in ("-h", "--help") for flag in argv):
        _parser().print_help()
        print("\nEvery flag of SGLang's own server is accepted, too; they follow.\n", flush=True)
        _use_cpu_engine_if_needed(argv)
        from sglang.srt.server_args import prepare_server_args

        prepare_server_args(["--help"])
    debug = os.environ.get("TLT_DEBUG") == "1"
    try:
        return _serve(argv)
    except TltError as error:
        if debug:
            raise
        print(f"tlt-sglang: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    except KeyboardInterrupt:
        return 130


def _parser() -> flags.Parser:
    parser = flags.Parser(
        "python -m tlt_sglang.launch_server",
        "SGLang with adaptive speculative decoding (TLT).",
    )
    group = parser.add_argument_group("flags of TLT")
    group.add_argument(
        "--model",
        "--model-path",
        dest="model",
        metavar="MODEL",
        help="a folder, a hub id, or smollm2-135m (prepared on first use)",
    )
    group.add_argument(
        "--adaptive-spec",
        action="store_true",
        help="turn TLT on: speculative decoding with n-grams, or with the drafter that "
        "--speculative-draft-model-path names",
    )
    group.add_argument(
        "--tlt-strategies",
        metavar="STRATEGY[,STRATEGY]",
        help="strategies to use instead of the default: eagle:STEPSxTOPKxTOKENS, "
        "eagle3:STEPSxTOPKxTOKENS, ngram:TOKENS or off; of several the best one for the batch is "
        "taken at every step",
    )
    group.add_argument(
        "--tlt-policy",
        choices=configuration.POLICIES,
        help="what chooses among several strategies (default: cost-model)",
    )
    group.add_argument(
        "--tlt-max-batch",
        type=int,
        metavar="N",
        help="no speculation for more running requests than this (default: as it pays)",
    )
    group.add_argument(
        "--tlt-ngram-memory-mb",
        type=int,
        metavar="MB",
        help="memory of the n-gram index among several strategies (default: 64)",
    )
    group.add_argument(
        "--tlt-draft-dtype",
        choices=["auto", "float32"],
        help="what the drafter's weights are read in on CPU (default: auto, which is eight bits; "
        "the output is the same)",
    )
    group.add_argument(
        "--tlt-draft-sampling",
        choices=["auto", "on", "off"],
        help="whether chains are drawn from the drafter's distribution for requests with a "
        "temperature, of which more are accepted; the output is distributed the same (default: "
        "auto, which is on, but on CUDA only with --speculative-use-rejection-sampling)",
    )
    group.add_argument(
        "--tlt-backlog-mb",
        type=int,
        metavar="MB",
        help="memory of the features that wait for a drafter that is not used (default: 128)",
    )
    group.add_argument(
        "--tlt-graph-memory-gb",
        type=float,
        metavar="GB",
        help="memory of captured graphs on CUDA; where it is short, what costs the least expected "
        "throughput is left out (see tlt plan)",
    )
    group.add_argument(
        "--tlt-calibrate",
        choices=["on", "off"],
        help="whether the server measures, before it is ready, what its strategies cost (default: "
        "on, which takes some seconds; off learns it from the first requests)",
    )
    group.add_argument(
        "--tlt-events",
        metavar="FILE",
        help="append an event log to this file, in JSON lines: changes of strategy, and what each "
        "strategy did in every second",
    )
    group.add_argument(
        "--tlt-trace",
        metavar="FILE",
        help="write what the policy is asked and told to this file, from which it can be replayed",
    )
    _add_drafter_flags(parser.add_argument_group("flags of the adaptive drafter"))
    group.add_argument(
        "--tlt-config",
        metavar="FILE",
        help="TOML file with these settings (as TLT_CONFIG does); turns TLT on",
    )
    return parser


def _add_drafter_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--tlt-store",
        metavar="DIR",
        help="folder of drafter versions: what the target computes is logged for a sidecar, and "
        "the versions that it publishes are swapped in while the engine runs",
    )
    add(
        "--tlt-grow",
        action="store_const",
        const=True,
        help="begin with n-grams and grow a drafter from the target's last layer, although there "
        "is one for this model",
    )
    add(
        "--tlt-harvest-gb",
        type=float,
        metavar="GB",
        help="shared memory of the log (default: 0.25; 0: none)",
    )
    add(
        "--tlt-harvest-rate",
        type=float,
        metavar="F",
        help="fraction of requests that are logged (default: 1)",
    )
    add(
        "--tlt-coordinator",
        metavar="ADDRESS",
        help="of the coordinator that this engine reports to, ipc:///FOLDER/NAME or "
        "tcp://HOST:PORT",
    )
    add("--tlt-coordinator-key", metavar="FILE", help="its CURVE key, for tcp://")
    add(
        "--tlt-device-name",
        metavar="NAME",
        help="what the coordinator calls this engine's device (default: by host and cores or GPU)",
    )
    supervise.add_flags(group)


def _serve(argv: list[str]) -> int:
    ours, rest = _parser().parse_known_args(argv)
    if not ours.model:
        raise ConfigError("Say which model to serve: --model FOLDER, a hub id, or smollm2-135m.")
    config = _config(ours)
    on_cpu = _use_cpu_engine_if_needed(rest)
    if on_cpu:
        rest = ["--device", "cpu", *rest]
    model = _model(ours.model, rest)
    rest = ["--model-path", model, *_drafter(config, model, rest), *rest]
    given = flags.read(rest)
    _check_port(given.host, given.port)
    sidecar = supervise.options(ours, config)
    if config is None:
        os.environ.pop(configuration.VARIABLE, None)
        return _run_sglang(rest, forked=False)
    if config.harvests:
        segments.remove_stale()
        segments.require_room(int(config.harvest_gb * 1e9))
    if seed.grows(config, given):
        rest = [_SPECULATION[0], str(seed.make(model, config)), *rest]
        given = flags.read(rest)
    if sidecar is not None:
        config = sidecar.joined(config)
    from tlt_sglang.config.arguments import native_fields, settle

    device: Device = "cpu" if on_cpu else "cuda"
    config = settle(config, given, device)
    os.environ[configuration.VARIABLE] = config.to_json()
    from tlt_sglang.launcher.environment import require_patchable

    native_fields(config, given, device)
    require_patchable(device)
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "tlt_sglang.models.no_models")
    if on_cpu:
        prefork.begin()
    with supervise.running(sidecar, config):
        return _run_sglang(rest, forked=on_cpu)


def _config(ours: argparse.Namespace) -> Config | None:
    """The configuration that the flags ask for; None leaves SGLang untouched."""
    if ours.tlt_config is not None:
        config: Config | None = configuration.from_file(Path(ours.tlt_config))
    else:
        config = configuration.from_environment()
    if ours.adaptive_spec:
        config = config or Config()
    settings = (field.name for field in dataclasses.fields(Config))
    said = {name: getattr(ours, f"tlt_{name}") for name in settings}
    given = {name: value for name, value in said.items() if value is not None}
    if not given:
        return config
    if config is None:
        flag = "--tlt-" + next(iter(given)).replace("_", "-")
        raise ConfigError(f"{flag} has no effect without --adaptive-spec; add it.")
    return configuration.from_fields(dataclasses.asdict(config) | given, "The command line")


def _model(name: str, argv: Sequence[str]) -> str:
    """The path or hub id to serve, prepared and looked at."""
    from tlt_sglang.models.drafter_checkpoint import read_config, require_weights
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(name)
    if read_config(path, "model") is None:
        return path
    if flag_value(argv, "--load-format") is None:
        require_weights(path)
    return str(Path(path).expanduser())


def _drafter(config: Config | None, model: str, argv: Sequence[str]) -> list[str]:
    """The flag that names the drafter shipped for `model`, unless the user says what drafts."""
    if config is None or config.grow or flag_value(argv, *_SPECULATION) is not None:
        return []
    if config.strategy is not None and config.strategy.drafter in ("off", "ngram"):
        return []
    from tlt_sglang.models.shipped import default_drafter

    folder = default_drafter(model)
    return [] if folder is None else [_SPECULATION[0], str(folder)]


def _use_cpu_engine_if_needed(argv: Sequence[str]) -> bool:
    """Whether this machine serves on CPU; if so, prepare the environment for SGLang's CPU engine.

    On CPU SGLang imports a module `sgl_kernel` in every process before plugins load. Where its
    compiled library is missing, ours stands in; child processes inherit sys.path.
    """
    device = flag_value(argv, "--device")
    if device is None:
        device = "cuda" if has_accelerator() else "cpu"
    if device == "cuda" and not has_accelerator():
        raise EnvironmentProblem(
            "There is no GPU driver here, so --device cuda cannot run; leave it out to run on CPU."
        )
    if device != "cpu":
        return False
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from importlib.util import find_spec

    if find_spec("sgl_kernel") is None:
        sys.path.append(str(STAND_IN))
    return True


def has_accelerator() -> bool:
    """Whether this machine has a GPU driver; asked without importing torch."""
    nodes = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
    return any(Path(node).exists() for node in nodes)


def flag_value(argv: Sequence[str], *names: str) -> str | None:
    """The last value that `argv` gives one of the flags `names` (`--flag v` or `--flag=v`)."""
    value = None
    for i, word in enumerate(argv):
        for name in names:
            if word == name and i + 1 < len(argv):
                value = argv[i + 1]
            elif word.startswith(name + "="):
                value = word[len(name) + 1 :]
    return value


def _check_port(host: str, port: str) -> None:
    """Raise EnvironmentProblem if the HTTP port is taken, before minutes go into loading."""
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise FlagError(f"--port {port} is not a port; give a number from 1 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EnvironmentProblem(
                f"Port {port} on {host} cannot be used ({reason}); choose another with --port or "
                "--host, or stop what holds it."
            ) from error


def _run_sglang(argv: list[str], forked: bool) -> int:
    """SGLang's own launch, in this process; ends every process that it started."""
    # What an import makes stays; looking for garbage in it, again and again, is a tenth of a start.
    gc.disable()
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints import http_server  # noqa: F401 (run_server would, later)
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    gc.enable()
    try:
        load_plugins()
        _check_flags(argv)
        args = prepare_server_args(argv)
        if forked:
            _launch_forked(args)
        else:
            run_server(args)
    except (TltError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        if error.code == SPOKEN:
            return 1
        raise
    except Exception as error:
        if f"exit code: {SPOKEN}" in str(error):
            return 1
        if os.environ.get("TLT_DEBUG") == "1":
            raise
        raise EnvironmentProblem(_first_sentence(error)) from error
    finally:
        supervise.stop()
        kill_process_tree(os.getpid(), include_parent=False)
        leftovers.remove()
        # A ZeroMQ context that is collected on the way out would wait for peers that are gone.
        gc.disable()
    return 0


def _check_flags(argv: list[str]) -> None:
    """Raise FlagError for what SGLang's parser would answer with two hundred lines of usage."""
    from sglang.srt.server_args import ServerArgs

    if flag_value(argv, "--config") is None:
        parser = flags.Parser("sglang serve", allow_abbrev=True)
        ServerArgs.add_cli_args(parser)
        parser.parse_args(argv)


def _launch_forked(args: Any) -> None:
    """SGLang's HTTP server with its processes from the fork server."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    http_server.launch_server(
        args,
        run_scheduler_process_func=prefork.Target(http_server.run_scheduler_process),
        run_detokenizer_process_func=prefork.Target(run_detokenizer_process),
    )


def _first_sentence(error: Exception) -> str:
    """What to tell of an error of SGLang's; `TLT_DEBUG=1` shows the whole of it."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    text = " ".join(" ".join(lines).split()) if lines[0].rstrip().endswith(":") else lines[0]
    if "scheduler died" in text:
        text = "the engine process stopped while starting; its message stands above"
    return f"SGLang did not start: {text.rstrip('.')} (TLT_DEBUG=1 shows the traceback)."


if __name__ == "__main__":
    sys.exit(main())
