"""Measure the policy that the RL run begins with, on problems that it has not seen.

    python -m benchmarks.rl_run.competence [--problems N] [--threads N]

One response at temperature 1 to each problem, from a server of ours without drafts; the entropy of
the policy at each of their tokens, in PyTorch. Writes benchmarks/results/rl_run_policy.json, with
the recipe and the curve of the fine-tuning.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import program, provenance
from benchmarks.harness.server import Server, default_threads
from benchmarks.rl_run import problems
from benchmarks.rl_run.fine_tune import Recipe, fine_tuned
from benchmarks.rl_run.problems import Problem

LONGEST = 1024
RUNNING = 16
PLAIN = ("--tlt-strategies", "off")


@dataclass(frozen=True)
class Response:
    """One response to one problem."""

    problem: Problem
    prompt: list[int]
    output: list[int]
    reward: float
    verify_steps: int
    """Steps in which its tokens were generated; without speculation one a token."""


def responses(
    folder: Path, count: int, threads: int, logs: Path, strategy: Sequence[str] = PLAIN
) -> list[Response]:
    """Return a response to each of the first held-out problems, from a server of ours.

    `strategy` are the server's flags for speculation.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    flags = ["--model", str(folder), "--device", "cpu", "--adaptive-spec", *strategy]
    flags += ["--max-running-requests", str(RUNNING), "--max-total-tokens", "20000"]
    with Server("policy", flags, threads, logs) as server:
        server.wait_started()

        def answer(numbered: tuple[int, Problem]) -> Response:
            seed, problem = numbered
            text = problems.prompt(problem.question)
            ids = tokenizer.encode(text, add_special_tokens=False)
            answer = server.answer(ids, LONGEST, 1.0, seed)
            output = answer["output_ids"]
            decoded = tokenizer.decode(output, skip_special_tokens=True)
            steps = answer["meta_info"].get("spec_verify_ct") or len(output)
            reward = problems.reward(problem.answer, decoded)
            return Response(problem, ids, output, reward, steps)

        numbered_problems = enumerate(itertools.islice(problems.problems("held out"), count))
        with ThreadPoolExecutor(RUNNING) as threads_pool:
            return list(threads_pool.map(answer, numbered_problems))


@torch.no_grad()
def entropy(folder: Path, sampled: Sequence[Response]) -> float:
    """Return the mean entropy in nats of the policy at the tokens of these responses."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for one in sampled:
        logits = model(torch.tensor([one.prompt + one.output])).logits[0, len(one.prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)
        total -= float((logprobs.exp() * logprobs).sum())
        tokens += len(one.output)
    return total / tokens


def summarise(sampled: Sequence[Response], nats: float) -> dict[str, float | None]:
    """Return the figures, with the mean reward of each family."""
    lengths = [len(one.output) for one in sampled]
    median = statistics.median(lengths)
    figures = {
        "reward": statistics.mean(one.reward for one in sampled),
        "entropy": nats,
        "median_length": median,
        "longest_length": max(lengths),
        "longest_over_median": max(lengths) / median,
    }
    for family in problems.FAMILIES:
        own = [one.reward for one in sampled if one.problem.family == family.name]
        figures[f"reward_{family.name}"] = statistics.mean(own)
    return {name: round(value, 4) for name, value in figures.items()}


def measure(count: int, threads: int, logs: Path) -> None:
    """Measure, print and write the result."""
    folder = fine_tuned(Recipe())
    assert folder is not None
    torch.set_num_threads(threads)
    sampled = responses(folder, count, threads, logs)
    summary = summarise(sampled, entropy(folder, sampled))
    training = json.loads((folder / "fine_tuning.json").read_text())
    lengths = sorted(len(one.output) for one in sampled)
    document = provenance.document(
        "rl_run_policy", summary, problems=count, lengths=lengths, fine_tuning=training
    )
    provenance.write_json(provenance.RESULTS / "rl_run_policy.json", document)
    print(program.table(("figure", "value"), [(name, str(v)) for name, v in summary.items()]))


def main() -> int:
    """Return the exit status of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=64, help="Problems (default: 64)")
    parser.add_argument("--threads", type=int, help="Threads of the server (default: torch's)")
    args = parser.parse_args()
    threads = args.threads or default_threads()
    return program.run("rl_run_policy", lambda logs: measure(args.problems, threads, logs))


if __name__ == "__main__":
    sys.exit(main())
