"""The adaptive drafter on a real engine: what it gains, what it costs, how fast it gives way.

    python benchmarks/bench_adaptive_drafter.py [--quick] [--prompts FILE] [--json PATH] [--part P]

The engine has one core and the sidecar another. Traffic are prompts sampled at temperature 1, four
at once; accept lengths are of a chain of three, greedy, on prompts that the traffic never had.

grow      From nothing: n-grams, until a drafter that the sidecar grew is swapped in.
domain    From the shipped drafter, on prompts of one kind.
drift     The target is fine-tuned on another style and updated; the frozen drafter, then adapted.
cost      Harvesting on and off, the sidecar training and halted, in turn; swaps under load.
preempt   The sidecar trains while the engine is idle, and leaves when work comes.
replicas  Two engines; the first to finish its share trains while the other decodes its tail.

ngram_accept_len           Of n-grams, on the held-out prompts of `grow`.
grown_accept_len           Of the grown drafter, on the same.
domain_accept_ratio        Of the drafter after `domain`, over that of the shipped one.
drift_recovered_fraction   Of what the drafter lost with the target's update.
harvest_cost_fraction      Of throughput: 1 - with the log / without, median of pairs.
training_cost_fraction     The same of a sidecar that trains on the other core.
idle_sidecar_cores         CPU time a second of a sidecar that has nothing to train on.
swap_steps_p50, _p99       Time of a swap in decode steps of four requests.
preempt_ms_p50, _p99       From the order to stop to the sidecar's word that it has.
replicas_overlap_fraction  Of the tail of one engine, in which the other's core was trained on.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, server
from benchmarks.adaptive_engine import (
    AT_ONCE,
    CHAIN,
    NGRAM,
    Bench,
    Engine,
    Point,
    Sidecar,
    Traffic,
    told,
    wait,
)
from benchmarks.bench_drafter import in_chat
from benchmarks.common import say
from benchmarks.processes import stop
from tlt_sglang.coordinator.client import ask

MODEL = "smollm2-135m"
PARTS = ("grow", "domain", "drift", "cost", "preempt", "replicas")
HELD_OUT = 16
"""Prompts that only measure."""
PROBE_EVERY = 4
"""Batches of traffic between two looks at some of them."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    prompts: list[str] | None
    json: Path
    quick: bool
    parts: tuple[str, ...]

    @property
    def minutes(self) -> float:
        """Of traffic, of each part that learns."""
        return 3.0 if self.quick else 8.0

    @property
    def tokens(self) -> int:
        return 96

    @property
    def pairs(self) -> int:
        """Of the costs."""
        return 5 if self.quick else 9

    @property
    def swaps(self) -> int:
        return 20 if self.quick else 60

    @property
    def preemptions(self) -> int:
        return 8 if self.quick else 30


@dataclass
class Found:
    """What was measured."""

    summary: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Measurement:
    """The parts, one after the other, on one model."""

    def __init__(self, options: Options, path: str, folder: Path, logs: Path) -> None:
        """`folder`: for stores and whatever else is made."""
        self.options, self.path, self.folder = options, path, folder
        self.bench = Bench(path, logs)
        self.found = Found()
        self._probe: list[server.Prompt] = []

    def run(self, part: str) -> None:
        """One part; whatever it started has ended afterwards."""
        say(f"{part}: begins")
        try:
            getattr(self, part)()
        finally:
            self.bench.stop()
        say(", ".join(f"{name} {value}" for name, value in self.found.summary.items()))

    # -- the parts -------------------------------------------------------------------------------

    def grow(self) -> None:
        traffic, unseen = self._prompts(self.options.prompts or composed(400))
        store = self._store("grow")
        engine = self._ready(self.bench.engine(store, "--tlt-grow"))
        sidecar = self.bench.sidecar(store)
        sidecar.halt()
        ngram = engine.accept_length(unseen, self.options.tokens, NGRAM)
        say(f"n-grams: accept length {ngram:.3f}")
        sidecar.go_on()
        self._learn("grow", engine, traffic, self.options.minutes)
        sidecar.halt()
        grown = engine.accept_length(unseen, self.options.tokens, CHAIN)
        self.found.summary |= {
            "ngram_accept_len": round(ngram, 4),
            "grown_accept_len": round(grown, 4),
        }

    def domain(self) -> None:
        traffic, unseen = self._prompts(one_kind(400))
        store = self._store("domain")
        engine = self._ready(self.bench.engine(store, *self._shipped()))
        sidecar = self.bench.sidecar(store)
        sidecar.halt()
        before = engine.accept_length(unseen, self.options.tokens, CHAIN)
        sidecar.go_on()
        self._learn("domain", engine, traffic, self.options.minutes)
        sidecar.halt()
        after = engine.accept_length(unseen, self.options.tokens, CHAIN)
        self.found.details["domain"] = {"before": before, "after": after}
        self.found.summary["domain_accept_ratio"] = round(after / before, 4)

    def drift(self) -> None:
        traffic, unseen = self._prompts(self.options.prompts or composed(400))
        changed = self.folder / "changed"
        steps = 12 if self.options.quick else 30
        self.bench.other(
            "fine_tune", "-m", "benchmarks.fine_tune", self.path, str(changed), str(steps)
        ).wait_done(900)
        self.bench.stop()
        store = self._store("drift")
        engine = self._ready(self.bench.engine(store, *self._shipped()))
        sidecar = self.bench.sidecar(store)
        sidecar.halt()
        before = engine.accept_length(unseen, self.options.tokens, CHAIN)
        engine.post("/update_weights_from_disk", {"model_path": str(changed)}, timeout=120)
        fallen = engine.accept_length(unseen, self.options.tokens, CHAIN)
        say(f"accept length {before:.3f}; after the update {fallen:.3f}")
        frozen = Traffic(engine, traffic, self.options.tokens)
        frozen.run(30)
        self.found.curves["frozen"] = [asdict(point) for point in frozen.points]
        sidecar.go_on()
        self._learn("adapted", engine, traffic, self.options.minutes)
        sidecar.halt()
        adapted = engine.accept_length(unseen, self.options.tokens, CHAIN)
        self.found.details["drift"] = {"before": before, "fallen": fallen, "adapted": adapted}
        lost = before - fallen
        if lost < 0.05:
            say("the update cost the drafter nothing, so there is nothing to recover")
            return
        self.found.summary["drift_recovered_fraction"] = round((adapted - fallen) / lost, 4)

    def cost(self) -> None:
        traffic, _ = self._prompts(self.options.prompts or composed(400))
        store = self._store("cost")
        engine = self._ready(self.bench.engine(store, *self._shipped()))
        self._idle_cost(store)
        engine.pin(CHAIN)
        self._harvest_cost(engine, traffic)
        self._swap_cost(engine, traffic, store)
        sidecar = self.bench.sidecar(store, "--gate-steps", "1000000")
        Traffic(engine, traffic, self.options.tokens).run(20)
        wait("the sidecar's first step", lambda: sidecar.status().get("step", 0) > 1, 120)
        self._training_cost(engine, traffic, sidecar)

    def preempt(self) -> None:
        traffic, _ = self._prompts(self.options.prompts or composed(400))
        store = self._store("preempt")
        endpoint = self._coordinator()
        obeys = ("--tlt-coordinator", endpoint)
        engine = self._ready(self.bench.engine(store, *self._shipped(), *obeys))
        sidecar = self.bench.sidecar(store, *obeys, core=self.bench.cores[0])
        Traffic(engine, traffic, self.options.tokens).run(20)
        for number in range(self.options.preemptions):
            wait("training", lambda: sidecar.status().get("training") is True, 120)
            time.sleep(0.3 + 0.1 * (number % 7))
            engine.generate(traffic[:1], 24)
        status = ask(endpoint)
        stops = sorted([] if status is None else status.stop_ms)
        late = None if status is None else status.late
        self.found.details["preempt"] = {"stop_ms": stops, "late": late, "limit_ms": 500}
        self.found.summary |= {
            "preempt_ms_p50": round(quantile(stops, 0.5), 2),
            "preempt_ms_p99": round(quantile(stops, 0.99), 2),
        }

    def replicas(self) -> None:
        traffic, _ = self._prompts(self.options.prompts or composed(400))
        store = self._store("replicas")
        endpoint = self._coordinator()
        obeys = ("--tlt-coordinator", endpoint, "--tlt-device-name")
        engines = [
            self.bench.engine(store, *self._shipped(), *obeys, f"core{core}", core=core)
            for core in self.bench.cores
        ]
        for engine in engines:
            self._ready(engine)
        first = self.bench.cores[0]
        self.bench.sidecar(store, *obeys, f"core{first}", core=first)
        for engine in engines:
            Traffic(engine, traffic, self.options.tokens).run(10)
        short = threading.Thread(target=engines[0].generate, args=(traffic[:AT_ONCE], 64))
        long = threading.Thread(target=engines[1].generate, args=(traffic[:AT_ONCE], 384))
        short.start()
        long.start()
        short.join()
        seen = trained = 0
        while long.is_alive():
            status = ask(endpoint)
            seen += 1
            trained += status is not None and status.states.get(f"core{first}") == "TRAINING"
            time.sleep(0.1)
        self.found.details["replicas"] = {"looks": seen, "trained": trained}
        self.found.summary["replicas_overlap_fraction"] = round(trained / max(1, seen), 4)

    # -- what they share -------------------------------------------------------------------------

    def _learn(
        self, name: str, engine: Engine, prompts: Sequence[server.Prompt], minutes: float
    ) -> None:
        traffic = Traffic(engine, prompts, self.options.tokens)
        began = time.monotonic()
        probes = self.found.curves.setdefault(f"{name}, held out", [])
        while time.monotonic() - began < 60 * minutes:
            for _ in range(PROBE_EVERY):
                traffic.batch()
            told(traffic.points)
            length = engine.accept_length(self._probe, 48, CHAIN)
            version = engine.status()["drafter_version"]
            probes.append(
                {"seconds": time.monotonic() - began, "accept_length": length, "version": version}
            )
        self.found.curves[name] = [asdict(point) for point in traffic.points]
        self.found.details[f"{name}_swaps"] = engine.status()["swap"]

    def _harvest_cost(self, engine: Engine, prompts: Sequence[server.Prompt]) -> None:
        speeds = self._in_turn(
            engine, prompts, lambda on: engine.post("/tlt/harvest", {"rate": 1.0 if on else 0.0})
        )
        engine.post("/tlt/harvest", {"rate": 1.0})
        self._cost("harvest_cost_fraction", speeds)

    def _idle_cost(self, store: Path) -> None:
        sidecar = self.bench.sidecar(store)
        wait("the sidecar", lambda: sidecar.status(), 120)
        self.found.summary["idle_sidecar_cores"] = round(sidecar.idle_share(10.0), 4)
        stop([sidecar.root])

    def _training_cost(
        self, engine: Engine, prompts: Sequence[server.Prompt], sidecar: Sidecar
    ) -> None:
        speeds = self._in_turn(
            engine, prompts, lambda on: sidecar.go_on() if on else sidecar.halt()
        )
        self._cost("training_cost_fraction", speeds)

    def _in_turn(
        self, engine: Engine, prompts: Sequence[server.Prompt], switch: Callable[[bool], None]
    ) -> list[tuple[float, float]]:
        """(tokens/s with it, without it) of each pair."""
        found = []
        for number in range(-1, self.options.pairs):
            speed = {}
            for on in (True, False):
                switch(on)
                sample = engine.generate(prompts[:AT_ONCE], 64)
                speed[on] = sample.tokens / sample.seconds
            if number >= 0:
                found.append((speed[True], speed[False]))
        return found

    def _cost(self, name: str, speeds: list[tuple[float, float]]) -> None:
        ratios = [on / off for on, off in speeds]
        self.found.details[name] = {
            "tokens_per_s": speeds,
            "ratios": common.spread(ratios).as_json(),
        }
        self.found.summary[name] = round(1 - statistics.median(ratios), 4)

    def _swap_cost(self, engine: Engine, prompts: Sequence[server.Prompt], store: Path) -> None:
        from tlt_sglang.models.shipped import default_drafter
        from tlt_sglang.weights import describe
        from tlt_sglang.weights.store import Store

        folder = default_drafter(MODEL)
        assert folder is not None
        expected = describe.expected(folder, describe.target_config(self.path), "F32")
        weights, versions = describe.load(folder), Store(store)
        plain = engine.generate(prompts[:AT_ONCE], 64)
        rounds = engine.status()["strategies"][CHAIN]["rounds"]
        engine.generate(prompts[:AT_ONCE], 64)
        rounds = (engine.status()["strategies"][CHAIN]["rounds"] - rounds) / AT_ONCE
        step_ms = 1000 * plain.seconds / rounds
        with Traffic(engine, prompts, self.options.tokens).beside():
            for _ in range(self.options.swaps):
                number = versions.publish(weights, expected.architecture, expected.base)
                wait("a swap", lambda: engine.status()["drafter_version"] == number, 60)  # noqa: B023
        swaps = sorted(ms for _, ms in engine.status()["swap"]["swaps"])
        self.found.details["swap"] = {"ms": swaps, "step_ms": round(step_ms, 2)}
        self.found.summary |= {
            "swap_steps_p50": round(quantile(swaps, 0.5) / step_ms, 3),
            "swap_steps_p99": round(quantile(swaps, 0.99) / step_ms, 3),
        }

    def _prompts(self, texts: Sequence[str]) -> tuple[list[server.Prompt], list[server.Prompt]]:
        """(for traffic, held out)."""
        tokens = in_chat(self.path, texts)
        self._probe = tokens[:AT_ONCE]
        return tokens[HELD_OUT:] or tokens, tokens[:HELD_OUT]

    def _coordinator(self) -> str:
        """The address of one that runs."""
        endpoint = f"ipc://{self.folder}/coordinator"
        self.bench.other(
            "coordinator", "-m", "tlt_sglang.cli", "coordinator", "--endpoint", endpoint
        )
        return endpoint

    def _store(self, name: str) -> Path:
        return self.folder / f"store-{name}"

    def _shipped(self) -> tuple[str, str]:
        from tlt_sglang.models.shipped import default_drafter

        return "--speculative-draft-model-path", str(default_drafter(MODEL))

    @staticmethod
    def _ready(engine: Engine) -> Engine:
        engine.wait_ready()
        return engine


def composed(count: int) -> list[str]:
    """Requests as people write them."""
    from tlt_sglang.training.requests import compose

    return list(compose(count, seed=11))


def one_kind(count: int) -> list[str]:
    """Requests for programs, which the shipped drafter has seen little of."""
    names = (
        "a list",
        "a string",
        "a dictionary",
        "a matrix",
        "a queue",
        "a set",
        "a file",
        "a tree",
    )
    verbs = ("sorts", "reverses", "counts", "filters", "merges", "prints", "copies", "checks")
    ways = (
        "without recursion",
        "with a test",
        "with type hints",
        "in one line",
        "step by step",
        "with error handling",
        "as a class",
    )
    texts = [
        f"Write a Python function that {verb} {name} {way}."
        for name in names
        for verb in verbs
        for way in ways
    ]
    random.Random(3).shuffle(texts)
    return texts[:count]


def quantile(ranked: Sequence[float], share: float) -> float:
    """Of ascending values; 0.0 of none."""
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0.0


def plot(found: Found, path: Path) -> None:
    """The curves, one under the other, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in found.curves if found.curves.get(f"{name}, held out")]
    if not names:
        return
    figure, rows = pyplot.subplots(len(names), 2, figsize=(12, 3.2 * len(names)), squeeze=False)
    for name, (left, right) in zip(names, rows, strict=True):
        points = [Point(**point) for point in found.curves[name]]
        probes = found.curves[f"{name}, held out"]
        at = [point.seconds / 60 for point in points]
        left.plot(
            [probe["seconds"] / 60 for probe in probes],
            [probe["accept_length"] for probe in probes],
            "o-",
            ms=3,
            label=f"{CHAIN}, greedy, some held-out prompts",
        )
        left.plot(
            at,
            [point.accept_length for point in points],
            color="0.6",
            lw=0.8,
            label="as chosen, traffic",
        )
        right.plot(at, [point.tokens_per_s for point in points], color="tab:green")
        if name == "adapted" and "drift" in found.details:
            levels, frozen = found.details["drift"], found.curves["frozen"]
            ago = [(point["seconds"] - frozen[-1]["seconds"]) / 60 for point in frozen]
            left.plot(
                ago,
                [point["accept_length"] for point in frozen],
                color="tab:red",
                lw=0.8,
                label="as chosen, traffic, drafter frozen",
            )
            left.axhline(
                levels["before"],
                color="tab:green",
                lw=1,
                ls="--",
                label="before the target's update, all prompts",
            )
            left.axhline(
                levels["fallen"],
                color="tab:red",
                lw=1,
                ls="--",
                label="frozen drafter after it, all prompts",
            )
        for axes in (left, right):
            for before, after in itertools.pairwise(points):
                if after.version != before.version:
                    axes.axvline(after.seconds / 60, color="grey", lw=0.6, ls=":")
            axes.set_xlabel("minutes (dotted: a version is swapped in)")
        left.set_title(f"{name}: accept length")
        right.set_title(f"{name}: tokens/s of the traffic")
        left.legend(fontsize=8, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: Sequence[str]) -> Options:
    """The options; raises UsageError with one sentence for what cannot be right."""
    parser = common.Parser("bench_adaptive_drafter", __doc__, "3 minutes of traffic in each part")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be repeated")
    args = parser.parse_args(argv)
    json = args.json or common.RESULTS / "bench_adaptive_drafter.json"
    common.check_writable(json)
    prompts = common.load_prompts(args.prompts) if args.prompts else None
    if prompts is not None and len(prompts) <= HELD_OUT:
        raise common.UsageError(f"{HELD_OUT} prompts only measure; give more than {HELD_OUT}.")
    return Options(prompts, json, args.quick, tuple(args.part or PARTS))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_adaptive_drafter", lambda logs: _benchmark(parse(words), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    with tempfile.TemporaryDirectory(prefix="bench-adaptive-") as work:
        measurement = Measurement(options, resolve_model(MODEL), Path(work), logs)
        for part in options.parts:
            measurement.run(part)
            _write(options, measurement)  # what is measured is kept if a later part fails
    found = measurement.found
    rows = [(name, f"{value:.3f}") for name, value in found.summary.items()]
    print(common.table(("figure", "value"), rows))
    say(f"written to {options.json}")


def _write(options: Options, measurement: Measurement) -> None:
    found = measurement.found
    settings = {
        "model": MODEL,
        "minutes": options.minutes,
        "tokens": options.tokens,
        "quick": options.quick,
        "parts": list(options.parts),
        "cores": measurement.bench.cores,
        "commands": measurement.bench.commands,
    }
    document = common.document(
        "adaptive_drafter",
        found.summary,
        settings=settings,
        details=found.details,
        curves=found.curves,
    )
    common.write_json(options.json, document)
    plot(found, options.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
