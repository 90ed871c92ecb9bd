"""`tlt sidecar`: trains the drafter of a store while engines run, and publishes what is better.

    engines' harvest logs -> feed -> buffer -> learner -> gate -> store -> engines' hot swap

It waits for an engine to announce itself in the store, and learns from it what to train and
against which target. It uses its device only while the coordinator lets it (or always, without
one); between two micro-batches it looks whether it has to stop. What it has learned is saved in
STORE/work, from which it goes on after whatever ended it. STORE/sidecar.json tells what it does,
and STORE/training.jsonl, with a line for each gate, how it went.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlt_sglang import __version__
from tlt_sglang.config import command_line as commands
from tlt_sglang.config import flags
from tlt_sglang.config.command_line import Parser
from tlt_sglang.config.settings import Config, settings_for
from tlt_sglang.config.sources import engine_device
from tlt_sglang.coordinator import messages as told
from tlt_sglang.coordinator.client import Client
from tlt_sglang.errors import ConfigError, EnvironmentProblem, FlagError, TltError
from tlt_sglang.harvest import announce, segments
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.observe.scalars import Scalars
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.feed import Feed
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store

if TYPE_CHECKING:
    import torch

    from tlt_sglang.sidecar.online import Gate, Learner

BUFFER_SHARE, ASSEMBLED_SHARE = 0.6, 0.2
"""Of the memory it may use; the rest is weights, optimizer and a micro-batch."""
IDLE_SECONDS = 0.05
MICRO_SHARE = 0.2
"""Of the time within which the device has to be left, that a micro-batch may take."""
TELL_SECONDS = 1.0
SAVE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Options:
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
        "--seconds", type=float, metavar="S", help="Exit after S seconds (default: run until ended)"
    )
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="Exit when the process PID, the parent, exits"
    )
    if commands.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    config = flags.with_flags(flags.base_config(args) or Config(), flags.flag_values(args))
    options = _options(config, args.seconds)
    if args.parent is not None:
        _end_with(args.parent)
    Sidecar(options).run()


def _options(config: Config, seconds: float | None) -> Options:
    """Return what `config` means for this process; raises ConfigError and FlagError."""
    if config.store_path is None:
        raise FlagError("The sidecar needs a store to publish to; give --tlt-store DIR.")
    _check_cores(config.sidecar_cores)
    # A sidecar that always trains asks nobody, although its engine may report to a coordinator.
    asks = config.sidecar != "always"
    key = config.coordinator_key
    return Options(
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


class Sidecar:
    """The process; `run` returns when it is told to end."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.store = Store(options.store)
        self.stopped = False
        self.version = 0
        """Of the drafter that engines use, as the store knows it."""
        self.published = 0
        self.gate: Gate | None = None
        self.scalars: Scalars | None = None
        self._allowed = options.coordinator is None
        self._client: Client | None = None
        self._began = time.monotonic()
        self._told = float("-inf")

    def run(self) -> None:
        """Wait for an engine, then train until told to end."""
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self._stop)
        segments.remove_stale()
        if self.options.tensorboard:
            self.scalars = Scalars(self.store.root / "tensorboard")
        try:
            engine = self._first_engine()
            if engine is None:
                return
            if self.options.coordinator is not None:
                device = self.options.device_name or engine.device
                name = f"sidecar@{os.getpid()}"
                key = self.options.coordinator_key
                self._client = Client(self.options.coordinator, name, "trainer", device, key=key)
            _Training(self, engine).run()
        finally:
            if self._client is not None:
                self._client.close()
            if self.scalars is not None:
                self.scalars.close()

    def _stop(self, *_: object) -> None:
        self.stopped = True

    @property
    def over(self) -> bool:
        """Whether to end now."""
        limit = self.options.seconds
        return self.stopped or (limit is not None and time.monotonic() - self._began > limit)

    def _first_engine(self) -> Announcement | None:
        said = False
        while not self.over:
            engines = announce.read(self.store.root)
            if engines:
                return engines[0]
            if not said:
                _say(f"waiting for an engine with --tlt-store {self.store.root}")
                said = True
            time.sleep(0.2)
        return None

    def allowed(self, leave: Any) -> bool:
        """Whether the device may be used now; `leave` gives it back, when it no longer may."""
        if self._client is None:
            return True
        for instruction in self._client.poll():
            if isinstance(instruction, told.Start):
                self._allowed = True
            elif isinstance(instruction, told.Stop):
                self._allowed = False
                leave()
                self._client.confirm_stop()
            elif isinstance(instruction, told.Kill):
                raise EnvironmentProblem(
                    "The coordinator ended this sidecar, which was late to stop; raise "
                    "--tlt-preempt-ms, or lower --tlt-sidecar-batch-tokens."
                )
        return self._allowed

    def tell(self, status: dict[str, Any], *, now: bool = False) -> None:
        """Write STORE/sidecar.json, once a second."""
        if now or time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            if self.scalars is not None and status["step"]:
                told = {name: status[name] for name in ("loss", "tokens", "published")}
                self.scalars.add(status["step"], told)
            path = self.store.root / "sidecar.json"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                temporary.write_text(json.dumps({"pid": os.getpid()} | status, indent=1))
                os.replace(temporary, path)
            except OSError:
                temporary.unlink(missing_ok=True)


class _Training:
    """Of one drafter."""

    def __init__(self, sidecar: Sidecar, engine: Announcement) -> None:
        import torch

        from tlt_sglang.sidecar.online import Learner, Settings
        from tlt_sglang.training.checkpoints import Checkpoints
        from tlt_sglang.training.models import DraftConfig, Drafter

        self.sidecar, self.engine, options = sidecar, engine, sidecar.options
        self.device = _device(options)
        self.folder = Path(engine.drafter)
        shape = describe.target_config(engine.model)
        self.expected = describe.expected(self.folder, shape, "F32")
        self.ids = describe.draft_ids(self.folder, shape["vocab_size"])
        algorithm = self.expected.architecture
        if algorithm not in ("eagle", "eagle3"):
            raise ConfigError(f"A drafter of the kind {algorithm} is not trained here.")
        self.config = DraftConfig.for_target(shape, algorithm, len(self.ids))  # type: ignore[arg-type]
        drafter = Drafter(self.config)
        _fill(drafter, describe.load(self.folder), self.folder)
        memory = int(options.memory_gb * 1e9)
        self.buffer = Buffer(int(BUFFER_SHARE * memory), options.seed)
        self.feed = Feed(
            sidecar.store.root,
            self.buffer,
            shape["hidden_size"],
            self.config.features,
            assembled=int(ASSEMBLED_SHARE * memory),
        )
        self.heads: tuple[int, str | None] = (-1, None)
        torch.manual_seed(options.seed)
        settings = Settings(
            learning_rate=options.learning_rate,
            batch_tokens=options.batch_tokens,
            gate_steps=options.gate_steps,
            seed=options.seed,
            bfloat16=_halves(self.device),
        )
        if options.coordinator is not None:
            # A micro-batch that has begun is ended beside an engine that wants the device.
            seconds = options.preempt_ms / 1000 * MICRO_SHARE
            settings = replace(settings, micro_seconds=seconds)
        if algorithm == "eagle":
            settings = replace(settings, steps=1)
        self.learner: Learner = Learner(
            drafter.to(self.device), self._frozen(engine), self.buffer, settings, self.device
        )
        self.checkpoints = Checkpoints(sidecar.store.root / "work" / "checkpoints")
        self._saved = time.monotonic()
        self._follow()
        if self.checkpoints.load(self.learner.state, self.learner.restore):
            _say(f"going on from step {self.learner.step}")
        _say(f"training an {algorithm} drafter of {engine.model} on {self.device}")

    def run(self) -> None:
        sidecar, learner = self.sidecar, self.learner
        try:
            while not sidecar.over:
                self.feed.pump()
                self._refresh()
                training = sidecar.allowed(learner.leave) and learner.can_train() and self.ready
                if training and learner.micro_step():
                    if learner.gate_is_due():
                        self._gate()
                    if time.monotonic() - self._saved > SAVE_SECONDS:
                        self._save()
                else:
                    time.sleep(IDLE_SECONDS)
                sidecar.tell(self._status(training))
        finally:
            self.feed.close()
            if learner.step:
                self._save()
                self.checkpoints.finish()
            sidecar.tell(self._status(False), now=True)

    @property
    def ready(self) -> bool:
        """Whether the heads of the target that the buffer is of are known."""
        return self.heads[0] == self.buffer.target_version

    # -- publishing ------------------------------------------------------------------------------

    def _gate(self) -> None:
        self._follow()
        gate = self.learner.gate(lambda: self.sidecar.allowed(self.learner.leave))
        if gate is None:
            return
        self.sidecar.gate = gate
        if gate.passed:
            self._publish(gate)
        self._note(gate)

    def _publish(self, gate: Gate) -> None:
        sidecar = self.sidecar
        weights = {n: t.detach().bfloat16().cpu() for n, t in self.learner.weights().items()}
        try:
            version = sidecar.store.publish(
                weights,
                self.expected.architecture,
                self.expected.base,
                parent=sidecar.version or None,
                gate={k: round(v, 4) for k, v in asdict(gate).items()}
                | {"step": self.learner.step, "target_version": self.buffer.target_version},
                made_by=f"tlt sidecar, tlt-sglang {__version__}",
            )
        except EnvironmentProblem as error:
            _say(str(error))  # it is tried again at the next gate
            return
        self.learner.published()
        sidecar.version, sidecar.published = version, sidecar.published + 1
        _say(
            f"version {version} published: accept length {gate.running:.3f} -> "
            f"{gate.candidate:.3f} on held-out requests, after {self.learner.step} steps"
        )

    def _follow(self) -> None:
        """Be at the version that engines are to use: another was rejected, or published."""
        sidecar = self.sidecar
        try:
            latest = sidecar.store.latest() or 0
            if latest == sidecar.version:
                return
            weights = sidecar.store.load(latest, self.expected) if latest else None
        except TltError as error:
            _say(str(error))
            return
        sidecar.version = latest
        self.learner.begin_again(weights or describe.load(self.folder))
        _say(f"going on from version {latest}")

    def _note(self, gate: Gate) -> None:
        line = asdict(gate) | {
            "time": time.time(),
            "step": self.learner.step,
            "loss": self.learner.loss,
            "tokens": self.learner.tokens,
            "version": self.sidecar.version,
            "target_version": self.buffer.target_version,
        }
        try:
            with (self.sidecar.store.root / "training.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            _say(f"STORE/training.jsonl cannot be written ({error.strerror})")
        if self.sidecar.scalars is not None:
            lengths = {"in use": gate.running, "trained": gate.candidate}
            self.sidecar.scalars.add(
                self.learner.step, {f"accept length/{n}": v for n, v in lengths.items()}
            )

    def _save(self) -> None:
        self._saved = time.monotonic()
        try:
            self.checkpoints.save(self.learner.step, self.learner.state())
        except EnvironmentProblem as error:
            _say(str(error))

    # -- the target ------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take over the heads of the target that an engine has announced."""
        engines = self.feed.engines
        if not engines:
            return
        newest = max(engines, key=lambda engine: engine.target_version)
        if (newest.target_version, newest.heads) == self.heads:
            return
        if newest.heads == "":
            return  # the engine cannot tell them
        try:
            self.learner.frozen = self._frozen(newest)
        except (OSError, TltError):
            return  # it has just been updated again
        self.buffer.move_on(newest.target_version, self.feed.rl_step)
        _say(f"the target is at version {newest.target_version}")

    @cached_property
    def own_head(self) -> torch.Tensor:
        """[D, N]: what the drafter has for good, of the target that the engine began with."""
        return describe.embedding_and_head(self.engine.model)[1][self.ids]

    def _frozen(self, engine: Announcement) -> Any:
        from safetensors.torch import load_file

        from tlt_sglang.training.simulate import Frozen

        own = None
        if engine.heads:
            heads = load_file(engine.heads)
            embedding = heads["embedding"]
            head, own = heads.get("head", embedding), self.own_head
        else:
            embedding, head = describe.embedding_and_head(engine.model)
        frozen = Frozen.of(embedding[: self.config.vocab_size], head, self.ids, own)
        import torch

        self.heads = (engine.target_version, engine.heads)
        return frozen.to(self.device, torch.float32)

    def _status(self, training: bool) -> dict[str, Any]:
        sidecar, learner = self.sidecar, self.learner
        return {
            "training": training,
            "step": learner.step,
            "tokens": learner.tokens,
            "loss": round(learner.loss, 4),
            "version": sidecar.version,
            "published": sidecar.published,
            "gate": None if sidecar.gate is None else asdict(sidecar.gate),
            "buffer": self.buffer.status(),
            "feed": self.feed.status(),
        }


def _fill(drafter: Any, weights: dict[str, Any], folder: Path) -> None:
    wrong = drafter.unfit(weights) + sorted(weights.keys() - drafter.state_dict().keys())
    if wrong:
        raise ConfigError(
            f"The drafter {folder} is not of the kind that is trained here: {wrong[0]} does not "
            "fit. Start the sidecar's engine with a drafter made by tlt train, or without one."
        )
    drafter.take(weights)


def _device(options: Options) -> torch.device:
    import torch

    if engine_device() == "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    if options.cores:
        os.sched_setaffinity(0, options.cores)
    if options.coordinator is None:
        os.nice(10)  # else the engine is idle, and what has begun should end soon
    torch.set_num_threads(options.threads)
    return torch.device("cpu")


def _halves(device: torch.device) -> bool:
    """Whether products in bfloat16 are the faster ones."""
    import torch

    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())


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
    """Get SIGTERM when the process that started this one ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise EnvironmentProblem(f"The process {parent} that started this sidecar has ended.")


def _say(text: str) -> None:
    from tlt_sglang.training.progress import say

    say(f"sidecar: {text}")
