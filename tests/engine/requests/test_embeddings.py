"""Requests of embeddings are answered as those of their tokens, alone and beside texts."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.support.identity import PINNED, POOL
from tests.support.long import first_and_long
from tests.support.servers import MODEL, Server, Servers, model_folder

FLAGS = ("--disable-radix-cache", "--chunked-prefill-size", "7")
"""SGLang's condition for embeddings, and prefills that end within a request."""
STRATEGIES = {"plain": "off", "pool": POOL, "one strategy": PINNED}
REQUESTS = 16
ROUNDS = 3
TOGETHER = 6


@dataclass(frozen=True)
class Case:
    """A request of so many tokens of prompt and of answer, which are sent as embeddings or ids."""

    seed: int
    prompt: int
    answer: int
    embeds: bool

    @property
    def ids(self) -> list[int]:
        return [
            (self.seed * 7919 + position * 31) % 40_000 + 100 for position in range(self.prompt)
        ]


def cases() -> list[Case]:
    rng = random.Random(3)
    return [
        Case(seed, rng.choice((1, 2, 3, 5, 8, 15)), rng.choice((1, 4, 9)), rng.random() < 0.5)
        for seed in range(REQUESTS)
    ]


def embedding_table(folder: Path) -> torch.Tensor:
    """Return the embeddings [V, N] of the model in `folder`, in float32."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (the object is no mapping)
                if name.endswith("embed_tokens.weight"):
                    table: torch.Tensor = tensors.get_tensor(name)
                    return table.float()
    raise AssertionError(f"no embeddings in {folder}")


def answer(server: Server, case: Case, table: torch.Tensor) -> list[int]:
    if not case.embeds:
        tokens: list[int] = server.generate(case.ids, case.answer)["output_ids"]
        return tokens
    parameters = {"temperature": 0.0, "max_new_tokens": case.answer, "ignore_eos": True}
    body = {"input_embeds": table[case.ids].tolist(), "sampling_params": parameters}
    tokens = server.post("/generate", body)["output_ids"]
    return tokens


@pytest.mark.parametrize("kind", first_and_long(STRATEGIES, first=2))
def test_embeddings_beside_texts(servers: Servers, drafters: dict[str, str], kind: str) -> None:
    strategies, table = STRATEGIES[kind], embedding_table(model_folder(MODEL))
    flags = ["--tlt-policy", "random"] if kind == "pool" else []
    drafter = None if kind == "plain" else drafters["eagle"]
    server = servers.get(strategies, *FLAGS, *flags, drafter=drafter)
    try:
        expected = [server.generate(case.ids, case.answer)["output_ids"] for case in cases()]
        assert [answer(server, case, table) for case in cases()] == expected
        with ThreadPoolExecutor(TOGETHER) as threads:
            for _ in range(ROUNDS):
                together = threads.map(lambda case: answer(server, case, table), cases())
                assert list(together) == expected
        server.wait_until_idle()
    finally:
        servers.drop(server)
