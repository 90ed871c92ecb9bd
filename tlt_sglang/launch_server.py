"""`python -m tlt_sglang.launch_server`: SGLang's server, with TLT's flags in front.

Reads our flags, leaves every other one to SGLang, checks what can be checked before anything heavy
is imported, then starts SGLang's own server in this process. Without `--adaptive-spec` SGLang runs
untouched. A problem ends it with one sentence and exit status 1 (2 for a bad flag), and nothing it
started stays behind.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tlt_sglang.config import command_line, flags, sglang_flags
from tlt_sglang.config.settings import SETTINGS, VARIABLE, Config, Device
from tlt_sglang.errors import ConfigError, EnvironmentProblem, FlagError, TltError
from tlt_sglang.harvest import segments
from tlt_sglang.harvest.log_size import log_bytes
from tlt_sglang.launcher import prefork, sglang_server, supervise
from tlt_sglang.launcher.environment import has_accelerator, has_cpu_kernels
from tlt_sglang.models import seed

_SPECULATION = (
    "--speculative-draft-model-path",
    "--speculative-draft-model",
    "--speculative-algorithm",
)
"""SGLang's flags that choose a drafter."""
STAND_IN = Path(__file__).parent / "cpu" / "stand_in"
"""The folder of our `sgl_kernel`, which stands in for SGLang's compiled library on CPU."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped; return the exit status of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(flag in ("-h", "--help") for flag in argv):
        _parser().print_help()
        print("\nThe flags of SGLang's own server are accepted, too:\n", flush=True)
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


def _parser() -> command_line.Parser:
    """Return the parser of our flags; every other flag is SGLang's."""
    parser = command_line.Parser(
        "tlt serve",
        "Serve a model with SGLang and adaptive speculative decoding (TLT). The same as "
        "python -m tlt_sglang.launch_server.",
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--model",
        "--model-path",
        dest="model",
        metavar="MODEL",
        help="Model to serve: a folder, a hub id, or smollm2-135m, which is prepared on first use",
    )
    server.add_argument(
        "--adaptive-spec",
        action="store_true",
        help="Turn TLT on: speculative decoding with the drafter that "
        "--speculative-draft-model-path names or that is shipped for the model, or with n-grams",
    )
    flags.add_config_flag(server, effect=", which turns TLT on")
    for group in dict.fromkeys(setting.group for setting in SETTINGS.values()):
        added = [setting for setting in SETTINGS.values() if setting.group == group]
        flags.add_flags(parser.add_argument_group(group.title.lower()), added)
    return parser


def _serve(argv: list[str]) -> int:
    """Check what can be checked without SGLang, then run it; return the exit status."""
    args, rest = _parser().parse_known_args(argv)
    if not args.model:
        raise ConfigError("Say which model to serve: --model FOLDER, a hub id, or smollm2-135m.")
    config = _config(args)

    # What SGLang is to serve: the device, the model, and the drafter shipped for it.
    on_cpu = _use_cpu_engine_if_needed(rest)
    if on_cpu:
        rest = ["--device", "cpu", *rest]
    model = _model(args.model, rest)
    rest = ["--model-path", model, *_drafter(config, model, rest), *rest]
    sglang_args = sglang_flags.read(rest)
    _check_port(sglang_args.host, sglang_args.port)
    sidecar = supervise.options(config, flags.flag_values(args))
    if config is None:
        os.environ.pop(VARIABLE, None)
        return sglang_server.run(rest, forked=False)

    # Shared memory for the harvest log, and a seed where no drafter exists yet.
    if config.harvests:
        segments.remove_stale()
        segments.require_room(log_bytes(config.harvest_gb))
    if seed.grows(config, sglang_args):
        rest = [_SPECULATION[0], str(seed.make(model, config)), *rest]
        sglang_args = sglang_flags.read(rest)
    if sidecar is not None:
        config = sidecar.joined(config)
    from tlt_sglang.config.sglang_arguments import native_fields, settle

    # The settled configuration travels in the environment; then the same checks as in SGLang.
    device: Device = "cpu" if on_cpu else "cuda"
    config = settle(config, sglang_args, device)
    os.environ[VARIABLE] = config.to_json()
    from tlt_sglang.launcher.environment import require_patchable

    native_fields(config, sglang_args, device)
    require_patchable(device)
    os.environ.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "tlt_sglang.models.no_models")
    if on_cpu:
        prefork.begin()
    with supervise.running(sidecar, config):
        return sglang_server.run(rest, forked=on_cpu)


def _config(args: argparse.Namespace) -> Config | None:
    """Return the configuration that the flags describe; None leaves SGLang untouched."""
    config = flags.base_config(args)
    if args.adaptive_spec:
        config = config or Config()
    values = flags.flag_values(args)
    if not values:
        return config
    if config is None:
        flag = SETTINGS[next(iter(values))].flag
        raise ConfigError(f"{flag} has no effect without --adaptive-spec; add it.")
    return flags.with_flags(config, values)


def _model(name: str, argv: Sequence[str]) -> str:
    """Return the path or hub id to serve, prepared and checked."""
    from tlt_sglang.models.drafter_checkpoint import read_config, require_weights
    from tlt_sglang.models.named import resolve_model

    path = resolve_model(name)
    if read_config(path, "model") is None:
        return path
    if sglang_flags.flag_value(argv, "--load-format") is None:
        require_weights(path)
    return str(Path(path).expanduser())


def _drafter(config: Config | None, model: str, argv: Sequence[str]) -> list[str]:
    """Return the flag for the configured drafter, or the one shipped with `model`, unless the flags
    choose a drafter."""
    if config is None or config.grow or sglang_flags.flag_value(argv, *_SPECULATION) is not None:
        return []
    if config.drafter is not None:
        return [_SPECULATION[0], config.drafter]
    if config.strategy is not None and config.strategy.drafter in ("off", "ngram"):
        return []
    from tlt_sglang.models.shipped import default_drafter

    folder = default_drafter(model)
    return [] if folder is None else [_SPECULATION[0], str(folder)]


def _use_cpu_engine_if_needed(argv: Sequence[str]) -> bool:
    """Return True if this machine serves on CPU, and then prepare SGLang's CPU engine.

    On CPU SGLang imports a module `sgl_kernel` in every process before plugins load. Where its
    compiled library is missing, or built for CUDA, ours stands in; the fork server, which does not
    inherit sys.path, finds it by PYTHONPATH.
    """
    device = sglang_flags.flag_value(argv, "--device")
    if device is None:
        device = "cuda" if has_accelerator() else "cpu"
    if device == "cuda" and not has_accelerator():
        raise EnvironmentProblem(
            "There is no GPU driver here, so --device cuda cannot run; leave it out to run on CPU."
        )
    if device != "cpu":
        return False
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    if not has_cpu_kernels():
        sys.path.insert(0, str(STAND_IN))
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STAND_IN), inherited)))
    return True


def _check_port(host: str, port: str) -> None:
    """Raise EnvironmentProblem if the HTTP port is in use, before minutes go into loading."""
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


if __name__ == "__main__":
    sys.exit(main())
