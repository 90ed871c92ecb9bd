"""Seeded requests under trouble: clients that ask again for whatever breaks off, until it is whole.

`Clients` send requests to a server that may be killed and replaced, and abort some of them halfway.
What has arrived of an answer is sent back with its prompt, and the server goes on from there.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import requests
import torch

from tests.support.identity import TIE, logprobs_of
from tests.support.reference_kernels import gumbel
from tests.support.servers import Server, ServerFailed

NO_END = {"logit_bias": {"2": -100.0}}
"""Keeps the model from ending its answer. With ignore_eos, SGLang reckons with the whole answer
beforehand, and retracts nothing."""
CONTEXTUAL = ("frequency_penalty", "repetition_penalty", "json_schema")
"""Parameters for which it matters where the prompt ends, so that an answer cannot go on."""


@dataclass(frozen=True)
class SeededRequest:
    """A request with its seed."""

    way: str
    prompt: Sequence[int]
    parameters: dict[str, Any]
    tokens: int

    @property
    def goes_on(self) -> bool:
        """True if the rest of an answer can be asked for, given its first tokens."""
        return not any(name in self.parameters for name in CONTEXTUAL)

    def body(self, first: Sequence[int] = (), stream: bool = False) -> dict[str, Any]:
        """Return the body of `POST /generate` for what follows the tokens `first`."""
        length = {"max_new_tokens": self.tokens - len(first)}
        parameters = NO_END | self.parameters | length
        ids = [*self.prompt, *first]
        return {"input_ids": ids, "sampling_params": parameters, "stream": stream}


@dataclass
class Clients:
    """Clients of one server, and what they lived through."""

    server: Server
    counts: dict[str, int] = field(
        default_factory=lambda: {"done": 0, "aborted": 0, "lost": 0, "retracted": 0}
    )
    up: threading.Event = field(default_factory=threading.Event)
    """Cleared while the server is replaced."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a count."""
        with self._lock:
            self.counts[what] += number

    def whole(self, request: SeededRequest, abort_at: int | None) -> list[int]:
        """Return the whole answer, asked for again as often as it breaks off.

        It is aborted once it has `abort_at` tokens, if it can go on then.
        """
        first: list[int] = []
        while True:
            self.up.wait()
            latest: dict[str, Any] = {}
            try:
                for latest in parts(self.server, request.body(first, stream=True)):
                    if abort_at is not None and len(latest["output_ids"]) >= abort_at:
                        self.server.post("/abort_request", {"rid": latest["meta_info"]["id"]})
                        abort_at = None
            except (requests.RequestException, ServerFailed):
                self.count("lost")
                self.up.wait(60)
            got = [*first, *latest.get("output_ids", [])]
            meta = latest.get("meta_info", {})
            self.count("retracted", meta.get("num_retractions", 0))
            reason = (meta.get("finish_reason") or {}).get("type")
            if reason in ("length", "stop") or len(got) == request.tokens:
                self.count("done")
                return got
            if reason == "abort":
                self.count("aborted")
            first = got if request.goes_on else []


def parts(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a streamed answer as they come; each has all tokens so far."""
    with server.request("POST", "/generate", json=body, stream=True) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def tie(
    off: Server, request: SeededRequest, expected: Sequence[int], got: Sequence[int]
) -> float | None:
    """Return the gap of the two noisy scores where the answers part.

    None stands for a gap that is too large for a tie, or not known.
    """
    if not request.goes_on:
        return None
    pairs = enumerate(zip(expected, got, strict=False))
    position, tokens = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    ids = [*request.prompt, *expected[:position]]
    one, other = logprobs_of(off, ids, tokens)
    noise = gumbel(
        torch.tensor([request.parameters["sampling_seed"]]),
        torch.tensor([len(ids) - 1]),
        torch.tensor(tokens),
    )[0]
    score = (one - other) / request.parameters["temperature"]
    gap = abs(score + float(noise[0] - noise[1]))
    return gap if gap < TIE else None
