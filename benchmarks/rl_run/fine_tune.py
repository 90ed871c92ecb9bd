"""Fine-tune the small model on worked solutions, to the policy that the RL run begins with.

    python -m benchmarks.rl_run.fine_tune [--tokens N] [--minutes M]

Plain PyTorch: the loss on the solutions alone, AdamW, products in bfloat16. With --minutes it stops
after that time and goes on with the next call. The policy lies in the cache folder under a
name that its recipe decides; it is made once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness.program import say
from benchmarks.rl_run import problems
from tlt_sglang.models.cache import cache_root
from tlt_sglang.models.named import resolve_model

MODEL = "smollm2-135m"
IGNORED = -100
BATCH_TOKENS = 1024
STORE_STEPS = 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Recipe:
    """The recipe, which decides the policy's weights; it is a part of the folder's name."""

    tokens: int = 250_000
    """Least tokens of prompts and solutions that are trained on, each once."""
    planned: int = 300_000
    """Tokens at which the learning rate would be at its end; stopping earlier leaves something to
    learn for RL."""
    step: int = 1280
    """Least tokens of a step."""
    learning_rate: float = 3e-4
    warm_up: int = 10
    """Steps of rising learning rate; it falls linearly to a tenth afterwards."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        """The folder of the policy in the cache."""
        text = json.dumps([asdict(self), problems.VERSION])
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cache_root() / "models" / f"{MODEL}-solutions-{key}"


@dataclass(frozen=True)
class Document:
    """The tokens of a prompt and its solution."""

    ids: list[int]
    prompt: int
    """Tokens of the prompt, which are not learned."""


@dataclass(frozen=True)
class Batch:
    """Documents of similar lengths, filled up at their ends; shape [documents, longest]."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The next token of each position; IGNORED in prompts and behind the end."""


def steps(recipe: Recipe, tokenizer: Any) -> Iterator[list[Document]]:
    """Yield the documents of one step after another, without end."""
    taken: list[Document] = []
    for problem in problems.problems("training", recipe.seed):
        prompt = tokenizer.encode(problems.prompt(problem.question), add_special_tokens=False)
        solution = tokenizer.encode(problem.solution, add_special_tokens=False)
        taken.append(Document([*prompt, *solution, tokenizer.eos_token_id], len(prompt)))
        if sum(len(one.ids) for one in taken) >= recipe.step:
            yield taken
            taken = []


def batches(documents: list[Document]) -> Iterator[Batch]:
    """Yield the documents in batches of at most BATCH_TOKENS, the longest ones first."""
    left = sorted(documents, key=lambda one: -len(one.ids))
    while left:
        longest = len(left[0].ids)
        size = max(1, BATCH_TOKENS // longest)
        taken, left = left[:size], left[size:]
        ids = torch.zeros(len(taken), longest, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for row, one in enumerate(taken):
            tokens = torch.tensor(one.ids)
            ids[row, : len(tokens)] = tokens
            labels[row, one.prompt - 1 : len(tokens) - 1] = tokens[one.prompt :]
        # Attention is causal: what stands behind the end changes nothing before it.
        yield Batch(ids, labels)


class FineTuning:
    """The model, its optimizer, and how far they are."""

    def __init__(self, recipe: Recipe, work: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(recipe.seed)
        base = resolve_model(MODEL)
        self.recipe, self.work = recipe, work
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), recipe.learning_rate, weight_decay=0.0, fused=True
        )
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        if (work / "state.pt").exists():
            self._resume()

    def run(self, minutes: float) -> bool:
        """Train for at most these minutes; return True once all tokens have been trained on."""
        began = time.monotonic()
        for step, documents in enumerate(steps(self.recipe, self.tokenizer)):
            if step < self.steps:
                continue
            if self.tokens >= self.recipe.tokens:
                return True
            before = time.monotonic()
            loss = self._step(documents)
            self.seconds += time.monotonic() - before
            self.curve.append({"tokens": self.tokens, "loss": round(loss, 4)})
            if self.steps % 5 == 0:
                say(
                    f"{self.tokens} of {self.recipe.tokens} tokens, loss {loss:.3f}, "
                    f"{self.tokens / self.seconds:.0f} tokens a second"
                )
            over = time.monotonic() - began > 60 * minutes
            if over or self.steps % STORE_STEPS == 0:
                self._store()
            if over:
                return False
        return True

    def _step(self, documents: list[Document]) -> float:
        """Take one step; return its loss in nats per token of the solutions."""
        recipe = self.recipe
        left = max(0.0, 1 - self.tokens / recipe.planned)
        rate = recipe.learning_rate * min((self.steps + 1) / recipe.warm_up, 0.1 + 0.9 * left)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        learned = sum(len(one.ids) - one.prompt for one in documents)
        total = 0.0
        for batch in batches(documents):
            chosen = batch.labels != IGNORED
            with torch.autocast("cpu", torch.bfloat16):
                states = self.model.model(input_ids=batch.input_ids, use_cache=False)
                logits = self.model.lm_head(states.last_hidden_state[chosen])
            loss: Any = functional.cross_entropy(
                logits.float(), batch.labels[chosen], reduction="sum"
            )
            (loss / learned).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.tokens += sum(len(one.ids) for one in documents)
        return total / learned

    def _store(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.steps, self.tokens, self.seconds, self.curve),
        }
        torch.save(state, self.work / "state.tmp")
        (self.work / "state.tmp").replace(self.work / "state.pt")

    def _resume(self) -> None:
        state = torch.load(self.work / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.tokens, self.seconds, self.curve = state["progress"]

    def save(self, folder: Path) -> None:
        """Write the policy as a checkpoint of transformers, with its curve."""
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        for name in TOKENIZER_FILES:
            shutil.copy(Path(resolve_model(MODEL)) / name, temporary / name)
        curve = {"recipe": asdict(self.recipe), "seconds": self.seconds, "curve": self.curve}
        (temporary / "fine_tuning.json").write_text(json.dumps(curve))
        temporary.replace(folder)


def fine_tuned(recipe: Recipe, minutes: float = float("inf")) -> Path | None:
    """Return the folder of the policy, made first if it is missing; None if the time is over."""
    folder = recipe.folder
    if not folder.exists():
        work = folder.with_name(f"{folder.name}.work")
        training = FineTuning(recipe, work)
        if not training.run(minutes):
            return None
        training.save(folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def main() -> None:
    """Make the policy, or go on making it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=Recipe.tokens, help="Tokens to train on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="Time of this call")
    args = parser.parse_args()
    folder = fine_tuned(Recipe(tokens=args.tokens), args.minutes)
    print(folder or "Not finished: run this again to go on.")


if __name__ == "__main__":
    main()
