"""The parts of `bench_adaptive_drafter` share these: options, results, processes and learning."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.adaptive_drafter.processes import AT_ONCE, CHAIN, Engine, Processes
from benchmarks.adaptive_drafter.prompts import composed
from benchmarks.adaptive_drafter.traffic import Traffic
from benchmarks.harness.prompts import Prompt, in_chat

MODEL = "smollm2-135m"
HELD_OUT = 16
"""Prompts that are used for evaluation only."""
PROBE_EVERY = 4
"""Batches of traffic between two evaluations on some of them."""

Curve = list[dict[str, object]]


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    prompts: list[str] | None
    json: Path
    quick: bool
    parts: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """Minutes of traffic in each part that learns."""
        return 3.0 if self.quick else 8.0

    @property
    def tokens(self) -> int:
        """Tokens of an answer."""
        return 96

    @property
    def pairs(self) -> int:
        """Pairs of measurements for each cost."""
        return 5 if self.quick else 9

    @property
    def swaps(self) -> int:
        """Swaps that are timed."""
        return 20 if self.quick else 60

    @property
    def preemptions(self) -> int:
        """Stops of the trainer that are timed."""
        return 8 if self.quick else 30


@dataclass
class Results:
    """The figures, the curves over time, and the details of the parts that ran."""

    summary: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)


class Measurement:
    """One model and the results so far; each part is a function of it."""

    def __init__(self, options: Options, path: str, folder: Path, logs: Path) -> None:
        """`folder` is for stores and other files that the parts make."""
        self.options, self.path, self.folder = options, path, folder
        self.processes = Processes(path, logs)
        self.results = Results()
        self.probe: list[Prompt] = []

    def add(self, **figures: float) -> None:
        """Add figures to the summary, rounded."""
        self.results.summary |= {name: round(value, 4) for name, value in figures.items()}

    def detail(self, name: str, content: Mapping[str, object]) -> None:
        """Add the details of a figure."""
        self.results.details[name] = dict(content)

    def prompts(self, texts: Sequence[str] | None = None) -> tuple[list[Prompt], list[Prompt]]:
        """Return (prompts for traffic, held-out prompts), by default of the user's file."""
        if texts is None:
            texts = self.options.prompts or composed(400)
        tokens = in_chat(self.path, texts)
        self.probe = tokens[:AT_ONCE]
        return tokens[HELD_OUT:] or tokens, tokens[:HELD_OUT]

    def store(self, name: str) -> Path:
        """Return the store of a part."""
        return self.folder / f"store-{name}"

    def shipped(self) -> tuple[str, str]:
        """Return the flags that load the shipped drafter."""
        from tlt_sglang.models.shipped import default_drafter

        return "--speculative-draft-model-path", str(default_drafter(MODEL))

    def engine(self, store: Path, *flags: str) -> Engine:
        """Start an engine and wait until it is ready."""
        engine = self.processes.engine(store, *flags)
        engine.wait_started()
        return engine

    def coordinator(self) -> str:
        """Start a coordinator and return its address."""
        endpoint = f"ipc://{self.folder}/coordinator"
        self.processes.other(
            "coordinator", "-m", "tlt_sglang.cli", "coordinator", "--tlt-coordinator", endpoint
        )
        return endpoint

    def learn(self, name: str, engine: Engine, prompts: Sequence[Prompt]) -> None:
        """Run traffic while the sidecar trains, and evaluate the drafter now and then."""
        traffic = Traffic(engine, prompts, self.options.tokens)
        began = time.monotonic()
        probes = self.results.curves.setdefault(f"{name}, held out", [])
        while time.monotonic() - began < 60 * self.options.minutes:
            for _ in range(PROBE_EVERY):
                traffic.batch()
            traffic.report()
            length = engine.accept_length(self.probe, 48, CHAIN)
            version = engine.status()["drafter_version"]
            probes.append(
                {"seconds": time.monotonic() - began, "accept_length": length, "version": version}
            )
        self.results.curves[name] = [asdict(point) for point in traffic.points]
        self.detail(f"{name}_swaps", engine.status()["swap"])
