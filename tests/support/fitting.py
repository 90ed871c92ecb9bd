"""Drafters that are right often: fitted, in closed form, to what the target said.

A random drafter is never accepted, and a test with one sees nothing but rejections. These have one
linear map that counts, from the features at a position to those at the next one, solved by ridge
regression on the target's own output; attention and MLP are random and faint, so that they run.
They know the texts they were fitted to by heart and are good for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.tiny import draft_vocabulary, make_drafter, make_target

RIDGE = 1e-3
FAINT = 1e-3
"""Scale of what attention and MLP add to the residual stream."""


@dataclass(frozen=True)
class Tiny:
    """A tiny random target, what transformers makes of it, and drafters fitted to it."""

    path: str
    model: Any
    drafters: dict[str, str]
    vocab: int = 24


def make_tiny(folder: Path) -> Tiny:
    """In `folder`: checkpoints of the target and of both kinds of drafters."""
    path = make_target(folder / "target", "llama", Tiny.vocab)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parameter.mul_(8)  # so that a token depends on all before it
    model.save_pretrained(path)
    torch.manual_seed(0)
    prompts = torch.randint(3, Tiny.vocab, (256, 4))
    sampled = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=24,
        min_new_tokens=24,
    )
    texts = [(row[:4].tolist(), row[4:].tolist()) for row in sampled]
    return Tiny(str(path), model, fit_drafters(folder, path, texts))


def fit_drafters(
    folder: Path, target: Path, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, str]:
    """Drafters of both kinds for `target`, fitted to pairs of prompt and output."""
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    eagle, eagle3, following = _features(model, texts)
    head, norm = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    made = {}
    for kind, inputs in (("eagle", eagle), ("eagle3", eagle3)):
        path = make_drafter(folder / kind, target, kind)
        file = path / "model.safetensors"
        weights = load_file(file)
        layer = "midlayer" if kind == "eagle3" else "layers.0"
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"{layer}.{name}.weight"] *= FAINT
        weights["fc.weight"] = _ridge(inputs, following)
        if kind == "eagle":
            weights["fc.bias"] = torch.zeros(len(norm))
        else:
            weights |= _draft_vocabulary(head, texts)
            # Its own norm comes after the map; ours maps to vectors that are normed already.
            weights["norm.weight"] = torch.ones_like(norm)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        made[kind] = str(path)
    return made


def _features(
    model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of EAGLE [P, 2N] and EAGLE-3 [P, 3N] and the features to predict [P, N]."""
    layers = model.config.num_hidden_layers
    captured = (2, layers // 2, layers - 3)
    eagle, eagle3, following = [], [], []
    with torch.inference_mode():
        embedding = model.get_input_embeddings().weight
        for prompt, output in texts:
            ids = torch.tensor([*prompt, *output])
            states = model.model(ids[None], output_hidden_states=True).hidden_states
            last = states[-1][0]
            at = slice(max(len(prompt) - 2, 0), len(ids) - 2)
            after = slice(at.start + 1, at.stop + 1)
            eagle.append(torch.cat([embedding[ids[after]], last[at]], dim=-1))
            eagle3.append(torch.cat([states[i][0][at] for i in captured], dim=-1))
            following.append(last[after])
    return torch.cat(eagle), torch.cat(eagle3), torch.cat(following)


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """W [N, K] that makes inputs [P, K] times its transpose close to outputs [P, N]."""
    x, y = inputs.double(), outputs.double()
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved: torch.Tensor = torch.linalg.solve(gram, x.T @ y)
    return solved.T.float()


def _draft_vocabulary(
    head: torch.Tensor, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> dict[str, torch.Tensor]:
    """Return EAGLE-3's head over the most frequent tokens of the outputs, and the maps between
    the vocabularies."""
    outputs = torch.tensor([token for _, output in texts for token in output])
    counts = torch.bincount(outputs, minlength=len(head))
    size = draft_vocabulary(len(head))
    chosen = counts.argsort(descending=True, stable=True)[:size].sort().values
    return {
        "lm_head.weight": head[chosen].clone(),
        "d2t": chosen - torch.arange(size),
        "t2d": torch.zeros(len(head), dtype=torch.bool).index_fill(0, chosen, True),
    }
