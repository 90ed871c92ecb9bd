"""Train the drafter that the RL run begins with: the shipped one, taught the policy's solutions.

    python -m benchmarks.rl_run.drafter

Whoever trains a policy has a drafter for it. The shipped drafter is one for the small model before
its fine-tuning, so `tlt train` goes on from it, on worked solutions that neither the fine-tuning
nor the run uses. The drafter lies in the cache folder, beside the policy; it is made once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.harness.program import BenchmarkError, say
from benchmarks.rl_run import problems
from benchmarks.rl_run.fine_tune import MODEL, Recipe, fine_tuned
from tlt_sglang.models.shipped import default_drafter

DATA_SEED = 1
"""The fine-tuning has seed 0 of the same problems."""
FURTHER_SEED = 2


@dataclass(frozen=True)
class DrafterRecipe:
    """The recipe, which is a part of the folder's name."""

    solutions: int = 1600
    minutes: float = 9.0
    """Time of the training alone, after the features are computed."""
    steps: int = 5
    batch_tokens: int = 768
    learning_rate: float = 1e-3

    def folder(self, policy: Path) -> Path:
        """Return the folder of the drafter for a policy."""
        text = json.dumps([asdict(self), problems.VERSION])
        return policy.with_name(f"{policy.name}-drafter-{_hash(text)}")

    def options(self) -> list[str]:
        """Return the options of `tlt train`."""
        return [
            *("--minutes", str(self.minutes), "--steps", str(self.steps)),
            *("--batch-tokens", str(self.batch_tokens)),
            *("--learning-rate", str(self.learning_rate), "--precision", "bfloat16"),
        ]


def shipped_drafter() -> Path:
    """Return the folder of the drafter that ships with this package."""
    drafter = default_drafter(MODEL)
    assert drafter is not None
    return drafter


def drafter_of(policy: Path, recipe: DrafterRecipe) -> Path:
    """Return the folder of the drafter for `policy`, trained first if it is missing.

    Raises BenchmarkError if the training fails.
    """
    folder = recipe.folder(policy)
    if not folder.exists():
        say(f"training a drafter for the policy, about {recipe.minutes + 3:.0f} minutes")
        _train(policy, shipped_drafter(), DATA_SEED, recipe, folder)
    return folder


def trained_further(drafter: Path, policy: Path, minutes: float, folder: Path) -> Path:
    """Return `folder` with a drafter that was trained so much longer, offline and with one thread.

    Its data are other worked solutions, and `policy` is the target. Raises BenchmarkError.
    """
    if not folder.exists():
        say(f"training the drafter offline for as long as the sidecar did, {minutes:.1f} minutes")
        recipe = replace(DrafterRecipe(), minutes=minutes)
        _train(policy, drafter, FURTHER_SEED, recipe, folder, threads=1)
    return folder


def _train(
    policy: Path, start: Path, seed: int, recipe: DrafterRecipe, folder: Path, threads: int = 0
) -> None:
    """Train a drafter from `start` on worked solutions, into `folder`."""
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    chosen = itertools.islice(problems.problems("training", seed), recipe.solutions)
    lines = [
        json.dumps({"prompt": problems.prompt(one.question), "response": one.solution})
        for one in chosen
    ]
    (work / "data.jsonl").write_text("\n".join(lines) + "\n")
    command = [
        *(sys.executable, "-m", "tlt_sglang.cli", "train", "--model", str(policy)),
        *("--data", str(work / "data.jsonl"), "--out", str(work / "drafter")),
        *("--start-from", str(start), *recipe.options()),
    ]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    if subprocess.run(command, check=False, env=environment).returncode:
        raise BenchmarkError("The drafter of the policy could not be trained; see above.")
    shutil.rmtree(work / "drafter" / "work", ignore_errors=True)
    (work / "drafter").replace(folder)
    shutil.rmtree(work)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def main() -> None:
    """Make the drafter, and the policy before it."""
    policy = fine_tuned(Recipe())
    assert policy is not None  # it has no time limit
    print(drafter_of(policy, DrafterRecipe()))


if __name__ == "__main__":
    main()
