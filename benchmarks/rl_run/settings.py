"""Describe one RL run, in files through which benchmark and trainer speak; no torch here.

The benchmark writes `settings.json` into a system's folder and starts the trainer there, which adds
a line to `steps.jsonl` after every step and writes `result.json` at the end.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

SETTINGS, STEPS, RESULT = "settings.json", "steps.jsonl", "result.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Settings:
    """The run of one system; all but `update`, `replicas` and `shipped` decide its last weights."""

    policy: str
    """Folder of the policy that the run begins with."""
    seed: int = 0
    steps: int = 40
    problems: int = 8
    """Problems of a step."""
    group: int = 8
    """Responses to each problem."""
    trained: int = 4
    """Responses to each problem that are trained on."""
    longest: int = 1024
    """Longest response in tokens."""
    learning_rate: float = 1e-5
    threads: int = 2
    """Threads of the trainer, which decide the order of its sums, and of all servers together."""
    replicas: int = 2
    """Servers, which share the responses."""
    update: str = "disk"
    """How weights reach the server: `disk`, or `xccl` through a process group."""
    shipped: bool = False
    """Begin with the drafter that ships with this package, not with one for the policy."""
    checkpoint_every: int = 5
    """Steps between two checkpoints."""

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Return the settings of the run in `folder`."""
        return cls(**json.loads((folder / SETTINGS).read_text()))

    def write(self, folder: Path) -> None:
        """Write the settings of the run in `folder`."""
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=1))

    def sample_seed(self, step: int, problem: int, sample: int) -> int:
        """Return the seed of one response."""
        text = f"{self.seed} {step} {problem} {sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Step:
    """One step of one system."""

    step: int
    rollout: str
    """SHA-256 of the tokens of all responses, in the order of problems and samples."""
    rollout_seconds: float
    train_seconds: float
    update_seconds: float
    reward: float
    accept_length: float
    """Tokens of a verify step, over all strategies; 1 without drafts."""
    strategies: dict[str, list[int]]
    """For each strategy, verify steps and accepted drafts; a step of a batch counts for each
    request."""
    tokens: int
    trained_tokens: int
    """Tokens of the responses that were trained on."""
    longest: int
    median: float
    tail_seconds: float
    """Seconds of the rollout with at most an eighth of the responses unfinished."""
    gap: float
    """Largest difference between the server's logprobs and the trainer's, of two responses; 0 if
    the step trained on none."""
    drafter_version: int
    """Version of the drafter at the end of the rollout; 0 without hot swaps."""


def read_steps(folder: Path) -> list[Step]:
    """Return the steps that a system has taken."""
    path = folder / STEPS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Step(**json.loads(line)) for line in lines]


def write_steps(folder: Path, steps: list[Step]) -> None:
    """Write all steps anew."""
    text = "".join(json.dumps(asdict(step)) + "\n" for step in steps)
    temporary = folder / f"{STEPS}.tmp"
    temporary.write_text(text)
    temporary.replace(folder / STEPS)
