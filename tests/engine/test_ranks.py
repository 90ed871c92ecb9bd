"""Two tensor-parallel ranks on CPU, over gloo: the output is that of one.

Strategies are chosen by measured times, which differ between the ranks: they would wait for each
other for ever if they did not agree.
"""

from __future__ import annotations

from pathlib import Path

import torch
from servers import Servers
from tiny import greedily, make_target
from transformers import AutoModelForCausalLM

FLAGS = ("--skip-tokenizer-init", "--tp-size", "2")
LENGTH = 40
POOL = "eagle3:3x4x8,off,eagle3:1x1x2,ngram:4"


def test_two_ranks(servers: Servers, tmp_path: Path) -> None:
    path = make_target(tmp_path / "target", "llama", 64, seed=5)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    server = servers.get(POOL, *FLAGS, model=str(path))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (1, n), generator=generator) for n in (1, 5, 17, 70)]
    expected = [greedily(model, prompt, LENGTH)[0] for prompt in prompts]
    answers = server.generate_all([prompt[0].tolist() for prompt in prompts], max_new_tokens=LENGTH)
    assert [answer["output_ids"] for answer in answers] == expected
    assert len(server.status()["schedulers"]) == 1  # SGLang asks the first rank
    used = server.status()["schedulers"][0]["strategies"]
    assert ",".join(used) == POOL
    assert sum(told["rounds"] > 0 for told in used.values()) > 1
    servers.drop(server)
