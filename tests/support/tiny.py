"""Checkpoints that the tests make: tiny random targets, and random drafters for any target.

A random drafter is accepted once in a vocabulary; it exercises every path of speculation and
changes no output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,  # the fewest of which EAGLE-3's three layers are distinct
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make_target(folder: Path, kind: str, vocab_size: int, seed: int = 0) -> Path:
    """A tiny random model of `kind` (llama, qwen2, qwen3), with no tokenizer."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(SHAPE, vocab_size=vocab_size)
    if kind == "qwen3":
        shape["head_dim"] = 32
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**shape), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # Spread the logits: a fresh model's distribution is all but uniform.
        if name.endswith(("lm_head.weight", "embed_tokens.weight")):
            parameter.data.normal_(std=0.25)
    model.save_pretrained(folder)
    return folder


def greedily(model: Any, prompts: torch.Tensor, length: int) -> list[list[int]]:
    """Generate with transformers after each of `prompts` [B, T], past the end of sequence."""
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=length,
        min_new_tokens=length,
        eos_token_id=None,
    )
    rows: list[list[int]] = output[:, prompts.shape[1] :].tolist()
    return rows


def by_seed(model: Any, prompt: Sequence[int], length: int, seed: int) -> list[int]:
    """Return what coupled sampling says after `prompt` of transformers' logits, unfiltered."""
    from tlt_sglang.cpu.kernels import noise

    text, ones, seeds = list(prompt), torch.ones(1), torch.tensor([seed])
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1].float()
        text.append(int(noise.sample(logits, ones, seeds, torch.tensor([len(text) - 1]))))
    return text[len(prompt) :]


def draft_vocabulary(vocab: int) -> int:
    """Tokens that an EAGLE-3 drafter knows; never all of them."""
    return min(vocab * 5 // 6, 1024)


def make_drafter(folder: Path, target: Path, kind: str, seed: int = 1, **config: Any) -> Path:
    """A random drafter of `kind` (eagle, eagle3) for the checkpoint in `target`.

    `config` overrides fields of the drafter's config.json.
    """
    base = json.loads((target / "config.json").read_text())
    hidden, inner, vocab = base["hidden_size"], base["intermediate_size"], base["vocab_size"]
    heads, kv_heads = base["num_attention_heads"], base["num_key_value_heads"]
    dim = hidden // heads
    kept = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
    )
    fields: dict[str, Any] = {name: base[name] for name in kept if name in base}
    fields |= {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "rope_theta": 10000.0,
    }
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        tensor: torch.Tensor = torch.randn(*shape, generator=rng) * float(shape[-1]) ** -0.5
        return tensor

    layer = "midlayer" if kind == "eagle3" else "layers.0"
    width = 2 * hidden if kind == "eagle3" else hidden
    weights = {
        f"{layer}.self_attn.q_proj.weight": random(heads * dim, width),
        f"{layer}.self_attn.k_proj.weight": random(kv_heads * dim, width),
        f"{layer}.self_attn.v_proj.weight": random(kv_heads * dim, width),
        f"{layer}.self_attn.o_proj.weight": random(hidden, heads * dim),
        f"{layer}.mlp.gate_proj.weight": random(inner, hidden),
        f"{layer}.mlp.up_proj.weight": random(inner, hidden),
        f"{layer}.mlp.down_proj.weight": random(hidden, inner),
        f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
    }
    if kind == "eagle3":
        draft_vocab = draft_vocabulary(vocab)
        chosen = torch.randperm(vocab, generator=rng)[:draft_vocab].sort().values
        fields |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": draft_vocab}
        weights |= {
            "fc.weight": random(hidden, 3 * hidden),
            "midlayer.hidden_norm.weight": torch.ones(hidden),
            "midlayer.input_layernorm.weight": torch.ones(hidden),
            "norm.weight": torch.ones(hidden),
            "lm_head.weight": random(draft_vocab, hidden),
            "d2t": chosen - torch.arange(draft_vocab),
            "t2d": torch.zeros(vocab, dtype=torch.bool).index_fill(0, chosen, True),
        }
    else:
        fields["architectures"] = ["LlamaForCausalLMEagle"]
        weights["fc.weight"] = random(hidden, 2 * hidden)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields | config, indent=2))
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "model.safetensors")
    return folder
