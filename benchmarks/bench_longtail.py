"""One rollout step of reasoning RL: groups of samples with a long tail of lengths, all at once.

    python benchmarks/bench_longtail.py [--quick] [--natural] [--prompts FILE] [--json PATH]

N prompts, G samples of each (as GRPO has them), greedy, with output lengths drawn once from a
lognormal law and forced with `ignore_eos`, so that every system makes the same tokens; with
--natural they end where the model ends them. With --temperature 1, as in RL, every system makes as
many tokens, but other ones. All are submitted at once, and fewer run than there are: the batch
fills, then drains, and the last few requests decide how long the step takes. Systems take turns,
each on a server of its own that has just started; each round has them all.

adaptive_vs_off               Wall time of ours without speculation, over that of ours adaptive.
adaptive_vs_stock             The same of stock SGLang (torch_native on CPU, its default on CUDA).
adaptive_vs_best_fixed        The same of the best of three fixed strategies.
adaptive_vs_upstream_adaptive The same of SGLang's own --speculative-adaptive; on CPU, where SGLang
                              does not speculate, of its rule (--tlt-policy ema) on our target.
tail_speedup                  Time with at most four requests left: off over adaptive.
outputs_identical             1.0 if all systems said the same tokens.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, processes, server
from benchmarks.bench_drafter import in_chat
from benchmarks.common import BenchmarkError, say

MODEL = "smollm2-135m"
OFF, STOCK, ADAPTIVE, UPSTREAM = "off", "stock", "adaptive", "upstream adaptive"
SIDECAR = "adaptive, sidecar"
FIXED = ("eagle3:1x1x2", "eagle3:3x1x4", "eagle3:3x4x8")
UPSTREAM_POOL = "off,eagle3:1x1x2,eagle3:3x1x4,eagle3:5x1x6,eagle3:7x1x8"
"""Chains of SGLang's own candidates for the number of steps."""
TAIL = 4
"""Requests left from which on it is the tail."""
SPREAD = 0.9
"""Standard deviation of the logarithm of a length."""
SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    prompts: list[str]
    json: Path
    quick: bool
    natural: bool
    temperature: float
    device: str
    model: str
    groups: int
    samples: int
    running: int
    median: int
    longest: int
    rounds: int
    systems: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """One sample of a group."""

    prompt: int
    tokens: int


@dataclass
class Played:
    """One system's step."""

    system: str
    round: int
    seconds: float
    tail_seconds: float
    """With at most TAIL requests left."""
    tokens: int
    rounds: int
    """Verify steps, over all requests; 0 without speculation."""
    output: str
    """Digest of all tokens."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    """Requests left, tokens a second and strategy, over time."""

    @property
    def accept_length(self) -> float:
        return self.tokens / self.rounds if self.rounds else 1.0


def workload(options: Options, seed: int = 0) -> list[Request]:
    """Groups one after the other; the same for every system and round."""
    chance = random.Random(seed)
    return [
        Request(group % len(options.prompts), length(chance, options.median, 8, options.longest))
        for group in range(options.groups)
        for _ in range(options.samples)
    ]


def length(chance: random.Random, median: int, least: int, most: int) -> int:
    """Tokens of a response, of a law with a long tail."""
    return max(least, min(most, round(median * chance.lognormvariate(0, SPREAD))))


def flags_of(system: str, options: Options, drafter: str, store: Path) -> list[str]:
    """Of a system's server, but for model and port."""
    words = ["--device", options.device, "--max-running-requests", str(options.running)]
    if options.device == "cpu":
        words += ["--max-total-tokens", "20000"]
    drafts = ["--speculative-draft-model-path", drafter]
    if system == STOCK:
        if options.device == "cpu":
            words += ["--attention-backend", "torch_native", "--dtype", "float32"]
            words += ["--disable-cuda-graph", "--sleep-on-idle"]
        return words
    if system == UPSTREAM and options.device != "cpu":
        return [
            *words,
            *drafts,
            "--speculative-algorithm",
            "EAGLE3",
            "--speculative-adaptive",
            "--speculative-num-steps",
            "3",
            "--speculative-eagle-topk",
            "1",
            "--speculative-num-draft-tokens",
            "4",
        ]
    words += ["--adaptive-spec"]
    if system == UPSTREAM:
        # SGLang cannot speculate on a CPU without us: its rule, over the steps that it tries.
        return [*words, *drafts, "--tlt-policy", "ema", "--tlt-strategies", UPSTREAM_POOL]
    if system == OFF:
        return [*words, "--tlt-strategies", "off"]
    if system in FIXED:
        return [*words, *drafts, "--tlt-strategies", system]
    if system == SIDECAR:
        words += ["--tlt-store", str(store / "versions"), "--tlt-sidecar", "idle"]
    return [*words, *drafts]


class Step:
    """One rollout step on a running server."""

    def __init__(
        self,
        process: server.Server,
        requests: Sequence[Request],
        prompts: Sequence[list[int]],
        natural: bool,
        temperature: float = 0.0,
    ) -> None:
        self.process, self.requests, self.prompts = process, requests, prompts
        self.natural, self.temperature = natural, temperature
        self.left = len(requests)
        self.ended: list[float] = []
        self.answers: dict[int, dict[str, Any]] = {}
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def play(self, system: str, number: int) -> Played:
        """Submit everything, wait for all of it."""
        self.process.flush()
        threads = [
            threading.Thread(target=self._ask, args=(place, request))
            for place, request in enumerate(self.requests)
        ]
        over = threading.Event()
        curve: list[dict[str, Any]] = []
        began = time.perf_counter()
        watcher = threading.Thread(target=self._watch, args=(began, curve, over))
        watcher.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        watcher.join()
        if self.problems:
            raise BenchmarkError(f"{system}: {self.problems[0]}")
        ended = sorted(self.ended)
        seconds = ended[-1] - began
        last = ended[-TAIL - 1] if len(ended) > TAIL else began
        metas = [self.answers[place]["meta_info"] for place in range(len(self.requests))]
        ids = [self.answers[place]["output_ids"] for place in range(len(self.requests))]
        return Played(
            system,
            number,
            seconds,
            ended[-1] - last,
            sum(meta["completion_tokens"] for meta in metas),
            sum(meta.get("spec_verify_ct") or 0 for meta in metas),
            common.digest(ids),
            curve,
        )

    def _ask(self, place: int, request: Request) -> None:
        body = {
            "input_ids": self.prompts[request.prompt],
            "sampling_params": {
                "temperature": self.temperature,
                "max_new_tokens": request.tokens,
                "ignore_eos": not self.natural,
            },
        }
        connection = http.client.HTTPConnection(
            server.HOST, self.process.port, timeout=server.ANSWER_TIMEOUT
        )
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/generate", json.dumps(body), headers)
            answer = json.loads(connection.getresponse().read())
            at = time.perf_counter()
            with self._lock:
                self.answers[place] = answer
                self.ended.append(at)
                self.left -= 1
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.problems.append(f"a request broke off: {error}")
        finally:
            connection.close()

    def _watch(self, began: float, curve: list[dict[str, Any]], over: threading.Event) -> None:
        before, at = 0.0, began
        while not over.wait(SAMPLE_SECONDS):
            with self._lock:
                left = self.left
            made, strategy = _progress(self.process)
            now = time.perf_counter()
            curve.append(
                {
                    "seconds": round(now - began, 2),
                    "left": left,
                    "strategy": strategy,
                    "tokens_per_s": round((made - before) / (now - at), 1) if made else None,
                }
            )
            before, at = made, now


def _progress(process: server.Server) -> tuple[float, str | None]:
    """(tokens made since the start, strategy), as far as the server tells."""
    try:
        status = process.get("/tlt/status")
    except (OSError, http.client.HTTPException, BenchmarkError):
        return 0.0, None
    if status is None:
        return 0.0, None
    first = status["schedulers"][0]
    each = (first.get("strategies") or {}).values()
    return float(sum(one["rounds"] + one["accepted"] for one in each)), first.get("strategy")


def measure(options: Options, path: str, folder: Path, logs: Path) -> list[Played]:
    """All systems, round after round; stores go into `folder`."""
    from tlt_sglang.models.shipped import default_drafter

    drafter = default_drafter(options.model)
    if drafter is None:
        raise common.UsageError(f"There is no drafter for {options.model}; use {MODEL}.")
    requests, prompts = workload(options), in_chat(path, options.prompts)
    threads = server.default_threads()
    total = sum(request.tokens for request in requests)
    say(f"{len(requests)} requests, {total} tokens, {options.running} at once")
    found: list[Played] = []
    for number in range(options.rounds):
        for system in options.systems:
            flags = ["--model", path, *flags_of(system, options, str(drafter), folder)]
            process = server.Server(system.replace(" ", "_"), flags, threads, logs)
            try:
                process.wait_ready()
                process.generate(prompts[:1], 16)
                step = Step(
                    process,
                    requests,
                    prompts,  # type: ignore[arg-type]
                    options.natural,
                    options.temperature,
                )
                found.append(step.play(system, number))
            finally:
                processes.stop([process.root])
                process.close()
            last = found[-1]
            say(
                f"{system}: {last.seconds:.1f} s, {last.tokens / last.seconds:.1f} tokens/s, tail "
                f"{last.tail_seconds:.1f} s, accept length {last.accept_length:.2f}"
            )
    return found


def summarise(found: Sequence[Played]) -> dict[str, float | None]:
    """The figures, from medians over the rounds of paired ratios."""
    return {
        "adaptive_vs_off": _ratio(found, OFF),
        "adaptive_vs_stock": _ratio(found, STOCK),
        "adaptive_vs_best_fixed": min(
            (ratio for name in FIXED if (ratio := _ratio(found, name)) is not None), default=None
        ),
        "adaptive_vs_upstream_adaptive": _ratio(found, UPSTREAM),
        "tail_speedup": _ratio(found, OFF, "tail_seconds"),
        "outputs_identical": float(len({one.output for one in found}) == 1),
    }


def _ratio(found: Sequence[Played], system: str, what: str = "seconds") -> float | None:
    """Median over the rounds of `system`'s time over the adaptive one's."""
    times = {(one.system, one.round): getattr(one, what) for one in found}
    pairs = [
        times[system, number] / times[ADAPTIVE, number]
        for name, number in times
        if name == ADAPTIVE and (system, number) in times
    ]
    return round(statistics.median(pairs), 4) if pairs else None


def plot(found: Sequence[Played], path: Path) -> None:
    """Requests left, tokens/s and strategy over time, systems under each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    systems = list(dict.fromkeys(one.system for one in found))
    # Stock takes several times as long as the others, which would all be at the left.
    shown = 1.02 * max([one.seconds for one in found if one.system != STOCK] or [found[0].seconds])
    figure, rows = pyplot.subplots(
        len(systems), 1, figsize=(11, 1.7 * len(systems)), sharex=True, squeeze=False
    )
    fastest = max([p["tokens_per_s"] or 0.0 for one in found for p in one.curve] or [0.0])
    names = sorted({str(p["strategy"]) for one in found for p in one.curve if p["strategy"]})
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    for system, (axes,) in zip(systems, rows, strict=True):
        one = next(played for played in found if played.system == system)
        at = [point["seconds"] for point in one.curve]
        axes.fill_between(at, [point["left"] for point in one.curve], color="0.88", step="post")
        axes.set_ylabel("requests left")
        speed = axes.twinx()
        for name in names:
            part = [p for p in one.curve if p["strategy"] == name and p["tokens_per_s"] is not None]
            speed.plot(
                [p["seconds"] for p in part],
                [p["tokens_per_s"] for p in part],
                ".",
                color=colours[name],
                label=name,
            )
        if any(p["tokens_per_s"] is not None for p in one.curve):
            speed.set_ylabel("tokens/s")
            speed.set_ylim(0, 1.1 * fastest)
        else:
            speed.set_yticks([])  # this server does not tell
        cut = f", of which the first {shown:.1f}" if one.seconds > shown else ""
        axes.set_title(f"{system}: {one.seconds:.1f} s{cut}", loc="left", fontsize=10)
        axes.set_xlim(0, shown)
    handles = [Line2D([], [], color=colours[n], marker=".", ls="", label=n) for n in names]
    figure.legend(handles=handles, loc="upper right", ncols=len(names) or 1, fontsize=8)
    rows[-1][0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: Sequence[str]) -> Options:
    """The options; raises UsageError with one sentence for what cannot be right."""
    parser = common.Parser("bench_longtail", __doc__, "one round of fewer, shorter requests")
    add = parser.add_argument
    add("--natural", action="store_true", help="end where the model ends, not at drawn lengths")
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling (default: 0)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--model", default=MODEL)
    add("--groups", type=int, metavar="N", help="prompts (default: 8, with --quick 4)")
    add("--samples", type=int, metavar="G", help="of each (default: 4)")
    add("--running", type=int, metavar="R", help="requests at once (default: 8)")
    add("--longest", type=int, metavar="T", help="tokens of a response (default: 640, quick 400)")
    add("--rounds", type=int, metavar="N", help="default: 3, with --quick 1")
    add("--system", action="append", help="only these; may be repeated")
    args = parser.parse_args(argv)
    json_path = args.json or common.RESULTS / "bench_longtail.json"
    common.check_writable(json_path)
    known = (OFF, STOCK, *FIXED, UPSTREAM, ADAPTIVE, SIDECAR)
    for system in args.system or ():
        if system not in known:
            raise common.UsageError(f"There is no system {system!r}; choose from {known}.")
    given = (args.groups, args.samples, args.running, args.longest, args.rounds)
    if any(number is not None and number < 1 for number in given):
        raise common.UsageError("Sizes are numbers from 1 on.")
    if not 0 <= args.temperature <= 2:
        raise common.UsageError(f"--temperature {args.temperature} is not from 0 to 2.")
    return Options(
        common.load_prompts(args.prompts) if args.prompts else list(common.PROMPTS),
        json_path,
        args.quick,
        args.natural,
        args.temperature,
        args.device,
        args.model,
        args.groups or (4 if args.quick else 8),
        args.samples or 4,
        args.running or 8,
        64 if args.quick else 128,
        args.longest or (400 if args.quick else 640),
        args.rounds or (1 if args.quick else 3),
        tuple(args.system or known),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 measured, 1 a problem, 2 bad input, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    return common.run("bench_longtail", lambda logs: _benchmark(parse(words), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    with tempfile.TemporaryDirectory(prefix="bench-longtail-") as work:
        found = measure(options, resolve_model(options.model), Path(work), logs)
    summary = summarise(found)
    if options.temperature > 0:
        summary["outputs_identical"] = None  # they are samples
    rows = []
    for system in dict.fromkeys(one.system for one in found):
        own = [one for one in found if one.system == system]
        ratio = _ratio(found, system)
        rows.append(
            (
                system,
                f"{statistics.median(one.seconds for one in own):.1f}",
                f"{statistics.median(one.tokens / one.seconds for one in own):.1f}",
                f"{statistics.median(one.tail_seconds for one in own):.1f}",
                f"{statistics.median(one.accept_length for one in own):.2f}",
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
    header = ("system", "seconds", "tokens/s", "tail s", "accept length", "adaptive is x faster")
    print(common.table(header, rows))
    told = [(name, "-" if value is None else f"{value:.3f}") for name, value in summary.items()]
    print(common.table(("figure", "value"), told))
    settings = {name: value for name, value in asdict(options).items() if name != "json"}
    document = common.document(
        "longtail",
        summary,
        settings=settings,
        workload=[asdict(r) for r in workload(options)],
        runs=[asdict(one) for one in found],
    )
    common.write_json(options.json, document)
    plot(found, options.json.with_suffix(".png"))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
