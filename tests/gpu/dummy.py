"""A model and an EAGLE-3 drafter that are only shapes: what a step costs depends on nothing else.

SGLang makes up the model's weights. The drafter's are zeros, with a map of its vocabulary. Accept
lengths mean nothing here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.prompts import Prompt

_COMMON = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def write(folder: Path, shape: Mapping[str, int]) -> tuple[str, str]:
    """Write both configurations, and return the folders of the model and of its drafter.

    `shape` has the sizes of the model's config.json and the drafter's `draft_vocab_size`.
    """
    target = {name: size for name, size in shape.items() if name != "draft_vocab_size"}
    model = _write(folder / "model", _COMMON | target, "LlamaForCausalLM")
    layer = dict(shape) | {"num_hidden_layers": 1}
    drafter = _write(folder / "drafter", _COMMON | layer, "LlamaForCausalLMEagle3")
    _write_weights(drafter, shape)
    return model, drafter


def flags(drafter: str | None, tokens: int) -> tuple[str, ...]:
    """Return the flags of a server with dummy weights and a KV pool of `tokens` tokens."""
    common = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", str(tokens))
    drafting = ("--speculative-draft-load-format", "auto", "--speculative-draft-model-path")
    return common if drafter is None else (*common, *drafting, drafter)


def prompts(count: int, vocab: int) -> list[Prompt]:
    """Return `count` prompts of 16 random tokens."""
    rng = random.Random(0)
    return [[rng.randrange(2, vocab) for _ in range(16)] for _ in range(count)]


def _write(folder: Path, config: Mapping[str, object], architecture: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"architectures": [architecture]} | dict(config), indent=1)
    (folder / "config.json").write_text(text)
    return str(folder)


def _write_weights(folder: str, shape: Mapping[str, int]) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv_size = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    vocab = shape["draft_vocab_size"]
    sizes = {
        "fc.weight": (hidden, 3 * hidden),
        "midlayer.self_attn.q_proj.weight": (hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_size, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, hidden),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    weights = {name: torch.zeros(size, dtype=torch.bfloat16) for name, size in sizes.items()}
    ids = torch.zeros(vocab, dtype=torch.int64)  # offsets: the first tokens stand for themselves
    save_file(weights | {"d2t": ids}, Path(folder) / "model.safetensors")
