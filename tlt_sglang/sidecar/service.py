"""`tlt sidecar`: train the drafter of a store while engines run, and publish better versions.

    engines' harvest logs -> feed -> buffer -> learner -> gate -> store -> engines' hot swap

The sidecar waits for an engine to announce itself in the store; the announcement names the drafter
to train and the target to train against. It uses its device only while the coordinator allows it
(without one, always), and checks that between two micro-batches. What it has learned is saved in
STORE/work, where the next sidecar continues. STORE/sidecar.json is its status, and
STORE/training.jsonl has a line for each gate.

This module is the command line; `process` is the process and `session` the training.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import Config, settings_for
from tlt_sglang.errors import ConfigError, EnvironmentProblem, FlagError
from tlt_sglang.launcher.parent_death import end_with_parent
from tlt_sglang.sidecar.process import Sidecar


@dataclass(frozen=True)
class SidecarOptions:
    """The settings of one sidecar process."""

    store: Path
    memory_gb: float
    coordinator: str | None
    coordinator_key: Path | None
    device_name: str | None
    preempt_ms: int
    threads: int
    cores: tuple[int, ...]
    learning_rate: float
    batch_tokens: int
    gate_steps: int
    seconds: float | None
    """Time after which the process ends; None: when it is stopped."""
    seed: int
    tensorboard: bool


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status: 0 stopped, 1 a problem, 2 bad usage, 130 interrupted."""
    try:
        return commands.run("sidecar", _sidecar, argv)
    except KeyboardInterrupt:
        return 130


def _sidecar(argv: Sequence[str]) -> None:
    parser = Parser("tlt sidecar", "Train the drafter of a weight store while engines run.")
    flags.add_flags(parser, settings_for("sidecar"))
    flags.add_config_flag(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="Exit after S seconds (default: run until stopped)",
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="Exit when the parent process PID exits"
    )
    if commands.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    config = flags.with_flags(flags.base_config(args) or Config(), flags.flag_values(args))
    options = _options(config, args.seconds)
    if args.parent is not None:
        _end_with(args.parent)
    Sidecar(options).run()


def _options(config: Config, seconds: float | None) -> SidecarOptions:
    """Return what `config` means for this process; raises ConfigError and FlagError."""
    if config.store_path is None:
        raise FlagError("The sidecar needs a store to publish to; give --tlt-store DIR.")
    _check_cores(config.sidecar_cores)
    # A sidecar that always trains asks nobody, although its engine may report to a coordinator.
    asks = config.sidecar != "always"
    key = config.coordinator_key
    return SidecarOptions(
        config.store_path,
        config.sidecar_memory_gb,
        config.coordinator if asks else None,
        None if key is None else Path(key),
        config.device_name,
        config.preempt_ms,
        config.sidecar_threads,
        config.sidecar_cores,
        config.sidecar_learning_rate,
        config.sidecar_batch_tokens,
        config.sidecar_gate_steps,
        seconds,
        config.sidecar_seed,
        config.sidecar_tensorboard,
    )


def _check_cores(cores: tuple[int, ...]) -> None:
    """Raise ConfigError for a core that this process may not use."""
    usable = sorted(os.sched_getaffinity(0))
    for core in cores:
        if core not in usable:
            raise ConfigError(
                f"--tlt-sidecar-cores {core} is not available; this process may use the cores "
                f"{', '.join(map(str, usable))}."
            )


def _end_with(parent: int) -> None:
    """Have this process get SIGTERM when the process that started it ends, however that ends."""
    end_with_parent()
    if os.getppid() != parent:
        raise EnvironmentProblem(f"The process {parent} that started this sidecar has ended.")
