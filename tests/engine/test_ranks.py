"""Two tensor-parallel ranks on CPU, over gloo: the output is that of one.

Strategies are chosen by measured times, which differ between the ranks: they would wait for each
other for ever if they did not agree.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.servers import Server, Servers
from tests.support.tiny import by_seed, greedily, make_target
from tlt_sglang.harvest import announce
from tlt_sglang.launcher.child_process import wait_for

FLAGS = ("--skip-tokenizer-init", "--tp-size", "2")
LENGTH = 40
POOL = "eagle3:3x4x8,off,eagle3:1x1x2,ngram:4"


def test_two_ranks(servers: Servers, tmp_path: Path) -> None:
    path = make_target(tmp_path / "target", "llama", 64, seed=5)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    store = tmp_path / "store"
    server = servers.get(POOL, *FLAGS, "--tlt-store", str(store), model=str(path))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (1, n), generator=generator) for n in (1, 5, 17, 70)]
    expected = [greedily(model, prompt, LENGTH)[0] for prompt in prompts]
    answers = server.generate_all([prompt[0].tolist() for prompt in prompts], max_new_tokens=LENGTH)
    assert [answer["output_ids"] for answer in answers] == expected
    assert len(server.status()["schedulers"]) == 1  # SGLang asks the first rank
    used = server.status()["schedulers"][0]["strategies"]
    assert ",".join(used) == POOL
    assert sum(report["verify_steps"] > 0 for report in used.values()) > 1
    for seed, prompt in enumerate(prompts):
        answer = server.generate(
            prompt[0].tolist(), temperature=1.0, sampling_seed=seed, max_new_tokens=LENGTH
        )
        assert answer["output_ids"] == by_seed(model, prompt[0].tolist(), LENGTH, seed)
    _update(server, store, make_target(tmp_path / "updated", "llama", 64, seed=6))
    servers.drop(server)


def _update(server: Server, store: Path, path: Path) -> None:
    """An update of the target announces its embedding and head to the sidecar, from both ranks."""
    assert server.post("/update_weights_from_disk", {"model_path": str(path)})["success"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = torch.tensor([[5, 9, 14, 3]])
    answer = server.generate(prompt[0].tolist(), max_new_tokens=LENGTH)
    assert answer["output_ids"] == greedily(model, prompt, LENGTH)[0]
    assert wait_for(lambda: bool(announce.read(store)[0].embed_and_head), 20)
    heads = load_file(announce.read(store)[0].embed_and_head or "")
    assert torch.equal(heads["embedding"][:64], model.model.embed_tokens.weight.bfloat16())
    assert torch.equal(heads["head"][:64], model.lm_head.weight.bfloat16())
