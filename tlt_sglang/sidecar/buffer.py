"""The online buffer: the sequences that the sidecar trains on. Pure: no clock, no I/O.

It holds sequences of the current RL step, and the long ones of the step before: early in a step
only short responses are complete, and a drafter that trains on those alone forgets the long tail
that it is meant for (TLT, arXiv 2511.16665: one-step offset). All are of one version of the target;
a new version empties the buffer, so that nothing trains on features of mixed versions.

It is bounded in bytes. Sequences are weighted by the length of their response, both when they are
sampled and when one has to go: each gets the priority u^(1/length) with u uniform, and the lowest
goes first (Efraimidis & Spirakis 2006), so long ones tend to stay, and short ones are not wiped
out. Equal calls with an equal seed have equal results.

Some are held out of training, for the gate: all samples of a prompt or none, as those of a group
(GRPO) say much the same. A prompt is known by its length, since a sample whose prompt was cached
has no more of it; where all prompts have one length, requests are held out one by one.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from tlt_sglang.harvest.sequence import TokenSequence

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 16
"""One in this many lengths of prompts is held out of training, and at least one of two."""
LONG_SHARE = 0.25
"""Share of a step's sequences, with the longest responses, that the next step keeps."""

REASONS = (
    "seen",
    "replaced",
    "evicted",
    "outdated",
    "late",
    "empty",
    "short",
    "repeated",
    "too_large",
)
"""Counters of `status`: sequences that arrived, and why others were refused or removed."""


class Buffer:
    """At most `limit` bytes of sequences."""

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seed = limit, seed
        self.stream = ""
        """Name of its stream of draws: buffers with the same sequences may draw differently."""
        self.target_version = -1
        self.step = -1
        self._kept: dict[str, TokenSequence[Tensor]] = {}
        self._held_out: set[str] = set()
        """Requests that are held out where their prompt does not decide it."""
        self._prompts: dict[str, int] = {}
        """The length of each request's prompt; 0 if it is not known."""
        self._held_lengths: dict[int, bool] = {}
        """True for lengths of prompts that are held out, in the order of their arrival."""
        self._chosen: int | None = None
        """The length that is held out where chance has held out none."""
        self._bytes = 0
        self.tokens = 0
        """Tokens of all sequences."""
        self._long = 0  # response length from which sequences of the step before are kept
        self._draws = 0
        self._counts: Counter[str] = Counter()

    def add(self, sequence: TokenSequence[Tensor]) -> bool:
        """Add a sequence; return whether it is in the buffer now. `status` counts the reasons."""
        self._counts["seen"] += 1
        self.move_on(sequence.target_version, sequence.rl_step)
        if reason := self._refusal(sequence):
            self._counts[reason] += 1
            return False
        prompt = self._prompts.get(sequence.request, 0)
        if sequence.prompt_length:
            prompt = sequence.start + sequence.prompt_length
        if sequence.request in self._kept:
            self._drop("replaced", sequence.request)
        if not self._kept:
            self._held_lengths.clear()
            self._chosen = None
        self._kept[sequence.request] = sequence
        self._prompts[sequence.request] = prompt
        if self._falls_out(sequence.request):
            self._held_out.add(sequence.request)
        if prompt and prompt not in self._held_lengths:
            self._held_lengths[prompt] = self._falls_out(str(prompt))
            self._choose(prompt)
        self._bytes += sequence.nbytes
        self.tokens += len(sequence)
        while self._bytes > self.limit:
            self._drop("evicted", min(self._kept, key=self._priority))
        return sequence.request in self._kept

    def move_on(self, target_version: int, step: int) -> None:
        """Move to this target version and RL step; remove sequences that are too old for them."""
        if target_version > self.target_version:
            self.target_version, self.step, self._long = target_version, step, 0
            self._drop_where("outdated", lambda sequence: True)
        elif target_version == self.target_version and step > self.step:
            before = step - 1
            lengths = [d.response_length for d in self._kept.values() if d.rl_step == before]
            lengths.sort(reverse=True)
            self._long = lengths[math.ceil(LONG_SHARE * len(lengths)) - 1] if lengths else 0
            self.step = step
            self._drop_where(
                "outdated", lambda d: d.rl_step < before or d.response_length < self._long
            )

    def clear(self) -> None:
        """Begin anew: with any version of the target and any step."""
        self._drop_where("outdated", lambda sequence: True)
        self.target_version = self.step = -1
        self._long = 0

    def sample(self, token_budget: int) -> list[TokenSequence[Tensor]]:
        """Return different sequences to train on, with at most `token_budget` tokens in all.

        Every call samples anew. A first sequence longer than the budget is returned alone.
        """
        rng = random.Random(f"{self.seed}/{self.stream}{self._draws}")
        self._draws += 1
        keyed = [
            (math.log(1.0 - rng.random()) / sequence.response_length, sequence)
            for sequence in self._kept.values()
            if not self._is_held_out(sequence.request)
        ]
        keyed.sort(key=lambda pair: -pair[0])
        chosen: list[TokenSequence[Tensor]] = []
        room = token_budget
        for _, sequence in keyed:
            if len(sequence) <= room or not chosen:
                chosen.append(sequence)
                room -= len(sequence)
        return chosen

    def held_out(self) -> list[TokenSequence[Tensor]]:
        """Return the sequences that `sample` never returns, in the order of their arrival."""
        return [sequence for key, sequence in self._kept.items() if self._is_held_out(key)]

    def _is_held_out(self, request: str) -> bool:
        prompt = self._prompts[request]
        if prompt and len(self._held_lengths) > 1:
            return self._held_lengths[prompt]
        return request in self._held_out

    def _choose(self, prompt: int) -> None:
        """Hold out a new length of prompts, if no other is, or perhaps in place of that one.

        Any that has arrived is held out with the same chance (a reservoir of one): the first are
        prompts with short answers. What has been trained on is never held out.
        """
        others = [length for length, held in self._held_lengths.items() if held]
        if others and others != [self._chosen]:
            return
        count = len(self._held_lengths) - 1
        if count and self._hash(f"{self.target_version} {prompt}") % count == 0:
            if self._chosen is not None:
                self._held_lengths[self._chosen] = False
            self._held_lengths[prompt], self._chosen = True, prompt

    def _falls_out(self, name: str) -> bool:
        return self._hash(f"held out {name}") % HELD_OUT == 0

    def __len__(self) -> int:
        return len(self._kept)

    def status(self) -> dict[str, int]:
        """Return the buffer's content, and the counters since the start."""
        return {
            "target_version": self.target_version,
            "step": self.step,
            "sequences": len(self._kept),
            "held_out": len(self.held_out()),
            "of_the_step_before": sum(d.rl_step < self.step for d in self._kept.values()),
            "tokens": self.tokens,
            "bytes": self._bytes,
            "limit": self.limit,
        } | {reason: self._counts[reason] for reason in REASONS}

    def _refusal(self, sequence: TokenSequence[Tensor]) -> str:
        existing = self._kept.get(sequence.request)
        if sequence.target_version < self.target_version or sequence.rl_step < self.step - 1:
            return "late"
        if sequence.response_length < 1:
            return "empty"
        if sequence.rl_step < self.step and sequence.response_length < self._long:
            return "short"
        if existing is not None and len(existing) >= len(sequence):
            return "repeated"
        if sequence.nbytes > self.limit:
            return "too_large"
        return ""

    def _priority(self, key: str) -> float:
        """Return log u^(1/length), with a u that depends only on the key."""
        u = (self._hash(key) + 1) / 2**64
        return math.log(u) / self._kept[key].response_length

    def _hash(self, text: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{text}".encode()).digest()[:8])

    def _drop(self, reason: str, key: str) -> None:
        sequence = self._kept.pop(key)
        self._held_out.discard(key)
        del self._prompts[key]
        self._bytes -= sequence.nbytes
        self.tokens -= len(sequence)
        self._counts[reason] += 1

    def _drop_where(self, reason: str, old: Callable[[TokenSequence[Tensor]], bool]) -> None:
        for key in [key for key, sequence in self._kept.items() if old(sequence)]:
            self._drop(reason, key)
