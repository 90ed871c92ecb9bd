"""Several steps of GRPO, rollout and policy update, with plain decoding and with adaptive drafts.

    python benchmarks/bench_rl_step.py [--quick] [--steps N] [--sidecar] [--json PATH]

Each system has a server and a policy of its own, both of the same checkpoint, and sees the same
problems: small sums of reasoning-gym, which also checks the answers. A step samples G responses to
each of N problems at temperature 1 with lengths of a long tail, scores them, takes one step of
policy gradient on them in PyTorch (GRPO: advantages within the group, arXiv 2402.03300, without a
KL term), and hands the weights to the server in one of SGLang's weight-update sessions. The systems
take turns. They sample different responses, so their rewards agree within noise only.

rollout_speedup    Time of a token in the rollouts: plain over adaptive, median of the steps.
step_speedup       Time of a whole step: plain over adaptive, for the same number of tokens and the
                   same time of training and update, both the average of the two systems.
reward_plain       Mean reward of all steps of the plain system.
reward_adaptive    Mean reward of all steps of the adaptive system.
reward_noise       Standard error of their difference, over problems.
accept_len_first   Accept length of the adaptive system in the first step.
accept_len_last    Accept length in the last step, by when the policy has changed.
"""

from __future__ import annotations

import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import program, provenance
from benchmarks.harness.processes import stop
from benchmarks.harness.program import UsageError, say
from benchmarks.harness.server import Server, default_threads
from benchmarks.harness.workload import Request, Rollout, length
from benchmarks.plots.rl_step import plot

MODEL = "smollm2-135m"
PLAIN, ADAPTIVE = "plain", "adaptive"
LEARNING_RATE = 2e-6
UPDATE_SECONDS = 300.0


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    json: Path
    quick: bool
    sidecar: bool
    model: str
    steps: int
    problems: int
    samples: int
    running: int
    median: int
    longest: int


@dataclass(frozen=True)
class Problem:
    """A question to the policy, with what the judge needs to score an answer."""

    prompt: list[int]
    entry: dict[str, object]
    """The problem as reasoning-gym has it."""
    tokens: tuple[int, ...]
    """The longest length of each sample."""


@dataclass
class StepResult:
    """One step of one system."""

    system: str
    step: int
    rollout_seconds: float
    train_seconds: float
    update_seconds: float
    rewards: list[float]
    """Mean reward of each group."""
    tokens: int
    accept_length: float

    @property
    def rest(self) -> float:
        """Seconds of the step without its rollout."""
        return self.train_seconds + self.update_seconds


class Policy:
    """The model that is trained, in plain PyTorch."""

    def __init__(self, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, fused=True)

    def update(self, samples: Sequence[tuple[list[int], list[int], float]]) -> None:
        """Take one step of policy gradient on (prompt, response, advantage), row by row."""
        import torch

        tokens = sum(len(response) for _, response, _ in samples)
        for prompt, response, advantage in samples:
            if advantage == 0:
                continue
            ids = torch.tensor([prompt + response])
            with torch.autocast("cpu", torch.bfloat16):
                logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            chosen = torch.tensor(response).unsqueeze(-1)
            logprobs = logits.float().log_softmax(-1).gather(-1, chosen)
            (-advantage * logprobs.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        """Write a checkpoint that the server can load."""
        self.model.save_pretrained(folder)


class System:
    """A server, the policy that it serves, and their steps so far."""

    def __init__(self, name: str, options: Options, path: str, work: Path, logs: Path) -> None:
        self.name, self.options, self.folder = name, options, work / name
        flags = ["--model", path, "--device", "cpu", "--max-total-tokens", "20000"]
        flags += ["--max-running-requests", str(options.running), "--adaptive-spec"]
        if name == PLAIN:
            flags += ["--tlt-strategies", "off"]
        elif options.sidecar:
            flags += ["--tlt-store", str(work / "versions"), "--tlt-sidecar", "idle"]
        self.server = Server(name, flags, default_threads(), logs)
        self.policy = Policy(path)
        self.results: list[StepResult] = []

    def step(self, number: int, problems: Sequence[Problem], judge: Judge) -> None:
        """Generate responses, score them, and update the policy."""
        requests = [
            Request(index, tokens) for index, one in enumerate(problems) for tokens in one.tokens
        ]
        rollout = Rollout(
            self.server, requests, [one.prompt for one in problems], natural=True, temperature=1.0
        )
        result = rollout.play(self.name, number)
        # Advantages within the group of each problem.
        began = time.perf_counter()
        samples, rewards = [], []
        each = self.options.samples
        for index, problem in enumerate(problems):
            outputs = [rollout.answers[index * each + i]["output_ids"] for i in range(each)]
            scores = [judge.reward(output, problem.entry) for output in outputs]
            rewards.append(statistics.mean(scores))
            scale = statistics.pstdev(scores) or 1.0
            samples += [
                (problem.prompt, output, (score - rewards[-1]) / scale)
                for output, score in zip(outputs, scores, strict=True)
            ]
        self.policy.update(samples)
        trained = time.perf_counter()
        self._hand_over()
        self.results.append(
            StepResult(
                self.name,
                number,
                result.seconds,
                trained - began,
                time.perf_counter() - trained,
                rewards,
                result.tokens,
                result.accept_length,
            )
        )

    def _hand_over(self) -> None:
        """Update the server's weights to the policy's."""
        self.policy.save(self.folder)
        send = self.server.send
        send("/begin_weight_update", {"selector": "target"}, UPDATE_SECONDS)
        send("/update_weights_from_disk", {"model_path": str(self.folder)}, UPDATE_SECONDS)
        send("/end_weight_update", {}, UPDATE_SECONDS)


class Judge:
    """Problems of reasoning-gym, and its score of answers to them."""

    def __init__(self, path: str, options: Options) -> None:
        from reasoning_gym.factory import create_dataset
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.options = options
        self.data: Any = create_dataset(
            "chain_sum",
            seed=7,
            size=options.steps * options.problems,
            min_terms=2,
            max_terms=3,
            min_digits=1,
            max_digits=1,
        )

    def problems(self, step: int) -> list[Problem]:
        """Return the problems of one step."""
        options, rng = self.options, random.Random(step)
        problems = []
        for entry in list(self.data)[step * options.problems : (step + 1) * options.problems]:
            question = f"{entry['question']} Think step by step, and end with the number."
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            lengths = tuple(
                length(rng, options.median, 16, options.longest) for _ in range(options.samples)
            )
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
            problems.append(Problem(ids, entry, lengths))
        return problems

    def reward(self, output: Sequence[int], entry: dict[str, object]) -> float:
        """Return the score of the last number in the response."""
        numbers = re.findall(r"-?\d+", self.tokenizer.decode(output, skip_special_tokens=True))
        return float(self.data.score_answer(numbers[-1] if numbers else None, entry))


def measure(options: Options, path: str, work: Path, logs: Path) -> list[StepResult]:
    """Run every step on both systems, in turn."""
    judge = Judge(path, options)
    systems: list[System] = []
    try:
        for name in (PLAIN, ADAPTIVE):
            systems.append(System(name, options, path, work, logs))
            systems[-1].server.wait_started()
        for number in range(options.steps):
            problems = judge.problems(number)
            for system in systems[:: 1 if number % 2 == 0 else -1]:
                system.step(number, problems, judge)
                last = system.results[-1]
                say(
                    f"step {number + 1} of {options.steps}, {last.system}: rollout "
                    f"{last.rollout_seconds:.1f} s, training {last.train_seconds:.1f} s, update "
                    f"{last.update_seconds:.1f} s, reward {statistics.mean(last.rewards):.3f}, "
                    f"accept length {last.accept_length:.2f}"
                )
    finally:
        stop([system.server for system in systems])
    return [result for system in systems for result in system.results]


def summarise(steps: Sequence[StepResult]) -> dict[str, float | None]:
    """Return the figures; times are medians over the steps of paired ratios."""
    plain = [one for one in steps if one.system == PLAIN]
    adaptive = [one for one in steps if one.system == ADAPTIVE]
    rewards = [[r for one in each for r in one.rewards] for each in (plain, adaptive)]
    differences = [b - a for a, b in zip(*rewards, strict=True)]
    noise = statistics.stdev(differences) / len(differences) ** 0.5 if differences[1:] else 0.0

    pairs = list(zip(plain, adaptive, strict=True))

    def ratio(rest: Callable[[StepResult, StepResult], float]) -> float:
        """Return plain over adaptive for steps of as many tokens, `rest` being the same in both."""
        ratios = []
        for a, b in pairs:
            tokens, same = (a.tokens + b.tokens) / 2, rest(a, b)
            times = [one.rollout_seconds / one.tokens * tokens + same for one in (a, b)]
            ratios.append(times[0] / times[1])
        return round(statistics.median(ratios), 4)

    return {
        "rollout_speedup": ratio(lambda a, b: 0.0),
        "step_speedup": ratio(lambda a, b: (a.rest + b.rest) / 2),
        "reward_plain": round(statistics.mean(rewards[0]), 4),
        "reward_adaptive": round(statistics.mean(rewards[1]), 4),
        "reward_noise": round(noise, 4),
        "accept_len_first": round(adaptive[0].accept_length, 4),
        "accept_len_last": round(adaptive[-1].accept_length, 4),
    }


def parse(argv: Sequence[str]) -> Options:
    """Return the options; raise UsageError with one sentence for what is wrong."""
    parser = program.Parser("bench_rl_step", __doc__, "Fewer steps of fewer, shorter responses")
    add = parser.add_argument
    add("--steps", type=int, metavar="N", help="Steps (default: 6, with --quick 3)")
    add("--problems", type=int, metavar="N", help="Problems of a step (default: 6, with --quick 4)")
    add("--samples", type=int, metavar="G", help="Responses to each problem (default: 4)")
    add("--running", type=int, metavar="R", help="Requests that run at once (default: 8)")
    add(
        "--longest",
        type=int,
        metavar="T",
        help="Tokens of the longest response (default: 512, with --quick 256)",
    )
    add("--sidecar", action="store_true", help="Train the drafter while the engine is idle")
    add("--model", default=MODEL, help=f"Model with a shipped drafter (default: {MODEL})")
    args = parser.parse_args(argv)
    if args.prompts is not None:
        raise UsageError(
            "--prompts has no meaning here: rewards need problems with known answers; leave it out."
        )
    json_path = args.json or provenance.RESULTS / "bench_rl_step.json"
    program.check_writable(json_path)
    program.check_sizes(args, "steps", "problems", "samples", "running", "longest")
    return Options(
        json_path,
        args.quick,
        args.sidecar,
        args.model,
        args.steps or (3 if args.quick else 6),
        args.problems or (4 if args.quick else 6),
        args.samples or 4,
        args.running or 8,
        48 if args.quick else 96,
        args.longest or (256 if args.quick else 512),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    return program.run("bench_rl_step", lambda logs: _benchmark(parse(arguments), logs))


def _benchmark(options: Options, logs: Path) -> None:
    from tlt_sglang.models.named import resolve_model

    with tempfile.TemporaryDirectory(prefix="bench-rl-step-") as work:
        steps = measure(options, resolve_model(options.model), Path(work), logs)
    summary = summarise(steps)
    rows = [
        (
            str(one.step + 1),
            one.system,
            f"{one.rollout_seconds:.1f}",
            f"{one.train_seconds:.1f}",
            f"{one.update_seconds:.1f}",
            f"{statistics.mean(one.rewards):.3f}",
            f"{one.accept_length:.2f}",
        )
        for one in sorted(steps, key=lambda one: one.step)
    ]
    header = ("step", "system", "rollout s", "training s", "update s", "reward", "accept length")
    print(program.table(header, rows))
    figures = [(name, "-" if value is None else f"{value:.3f}") for name, value in summary.items()]
    print(program.table(("figure", "value"), figures))
    settings = {name: value for name, value in asdict(options).items() if name != "json"}
    document = provenance.document(
        "rl_step", summary, settings=settings, steps=[asdict(one) for one in steps]
    )
    provenance.write_json(options.json, document)
    plot(steps, options.json.with_suffix(".png"))
    say(f"written to {options.json}")


if __name__ == "__main__":
    sys.exit(main())
