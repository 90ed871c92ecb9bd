"""Draft models in plain PyTorch, with the parameters of those that SGLang serves.

EAGLE (arXiv 2401.15077): one decoder layer without its first norm, on a linear map of [embedding of
the next token, the target's last hidden state]; it predicts the next hidden state.
EAGLE-3 (arXiv 2503.01840): hidden states of three of the target's layers, norms on both inputs, a
final norm, and a head over the most frequent tokens.

Parameters have the names of SGLang's `llama_eagle.py` and `llama_eagle3.py`. Embedding and head are
the target's; they are frozen and not parameters of a drafter.

T packed tokens, N hidden size, A features a token (1 or 3), H and K heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tlt_sglang.errors import ConfigError
from tlt_sglang.training.attention import attend

Algorithm = Literal["eagle", "eagle3"]
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of targets that drafters can be trained for."""


@dataclass(frozen=True)
class DraftConfig:
    """The shape of a drafter; the fields of its config.json have the same names."""

    algorithm: Algorithm
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    vocab_size: int
    draft_vocab_size: int

    @property
    def features(self) -> int:
        """Return the hidden states of the target that are read per token."""
        return 3 if self.algorithm == "eagle3" else 1

    @staticmethod
    def for_target(
        target: dict[str, Any], algorithm: Algorithm, draft_vocab_size: int | None = None
    ) -> DraftConfig:
        """Return the shape of a one-layer drafter for a target's config.json.

        Raises ConfigError for an architecture whose drafters SGLang does not serve this way.
        """
        names = target.get("architectures") or []
        if not any(name in ARCHITECTURES for name in names):
            raise ConfigError(
                f"Drafters are trained for {', '.join(ARCHITECTURES)}; the target is "
                f"{', '.join(map(str, names)) or 'of no known architecture'}."
            )
        heads, vocab = target["num_attention_heads"], target["vocab_size"]
        rope = target.get("rope_parameters") or {}
        return DraftConfig(
            algorithm,
            target["hidden_size"],
            target["intermediate_size"],
            heads,
            target.get("num_key_value_heads") or heads,
            target.get("head_dim") or target["hidden_size"] // heads,
            target["rms_norm_eps"],
            float(target.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            target["max_position_embeddings"],
            vocab,
            min(draft_vocab_size or vocab, vocab),
        )


def captured_layers(num_hidden_layers: int) -> tuple[int, int, int]:
    """Return the layers whose inputs are EAGLE-3's features, as SGLang chooses by default."""
    return 2, num_hidden_layers // 2, num_hidden_layers - 3


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 for any dtype of x [..., N]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * (
            self.weight
        )


class Attention(nn.Module):
    """Self-attention over packed sequences; inputs of `width` features a token."""

    def __init__(self, config: DraftConfig, width: int) -> None:
        super().__init__()
        dim = config.head_dim
        self.shape = (config.num_attention_heads, config.num_key_value_heads, dim)
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, config.hidden_size, bias=False)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        self.frequencies: Tensor
        self.register_buffer("frequencies", config.rope_theta**-exponents, persistent=False)

    def forward(self, x: Tensor, context: DraftContext) -> Tensor:
        """x [T, width] -> [T, N]; adds this step's keys and values to `context`."""
        heads, kv_heads, dim = self.shape
        q = self._rotate(self.q_proj(x).view(-1, heads, dim), context.step_positions)
        k = self._rotate(self.k_proj(x).view(-1, kv_heads, dim), context.step_positions)
        context.keys.append(k)
        context.values.append(self.v_proj(x).view(-1, kv_heads, dim))
        out = attend(q, context.keys, context.values, context.lengths)
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1).float() * self.frequencies  # [T, D / 2]
        cos, sin = (part.unsqueeze(1).to(x.dtype) for part in (angles.cos(), angles.sin()))
        one, two = x.chunk(2, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class MLP(nn.Module):
    """SwiGLU, [T, N] -> [T, N]."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """EAGLE's decoder layer: a Llama layer without its first norm."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        three = config.algorithm == "eagle3"
        self.self_attn = Attention(config, 2 * size if three else size)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        if three:
            self.input_layernorm = RMSNorm(size, eps)
            self.hidden_norm = RMSNorm(size, eps)
        self.three = three

    def forward(self, embeds: Tensor, hidden: Tensor, context: DraftContext) -> Tensor:
        """embeds and hidden [T, N] -> the residual stream after the layer [T, N]."""
        x = hidden
        if self.three:
            x = torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(x, context)
        added: Tensor = self.mlp(self.post_attention_layernorm(hidden))
        return hidden + added


@dataclass
class DraftContext:
    """The state of a simulated draft over packed sequences: keys and values of its steps so far."""

    lengths: list[int]
    positions: Tensor  # [T]
    keys: list[Tensor]
    values: list[Tensor]

    @staticmethod
    def of(lengths: list[int], positions: Tensor) -> DraftContext:
        """Return the state before the first step."""
        return DraftContext(lengths, positions, [], [])

    @property
    def step_positions(self) -> Tensor:
        """Return the positions [T] of the next step."""
        return self.positions + len(self.keys)


class Drafter(nn.Module):
    """An EAGLE or EAGLE-3 drafter without embedding and head."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.config = config
        three = config.algorithm == "eagle3"
        self.fc = nn.Linear(3 * size if three else 2 * size, size, bias=not three)
        self.layers = nn.ModuleList([Layer(config)])
        if three:
            self.norm = RMSNorm(size, config.rms_norm_eps)

    def unfit(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Return the names of its weights that are missing in `weights` or differ in shape."""
        own = self.state_dict()
        return [n for n, w in own.items() if n not in weights or weights[n].shape != w.shape]

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Load `weights` of the same names and shapes, converted to its own dtypes."""
        own = self.state_dict()
        self.load_state_dict({name: weights[name].to(own[name]) for name in own})

    def forward(
        self, embeds: Tensor, hidden: Tensor, context: DraftContext
    ) -> tuple[Tensor, Tensor]:
        """Run one step; return (input of the head, input of the next step), each [T, N].

        `hidden` is the target's features [T, A * N] in the first step, then the second result
        [T, N] of the previous step.
        """
        if self.config.algorithm == "eagle3":
            if hidden.shape[-1] != embeds.shape[-1]:
                hidden = self.fc(hidden)
            hidden = self.layers[0](embeds, hidden, context)
            return self.norm(hidden), hidden
        joined = self.fc(torch.cat([embeds, hidden], dim=-1))
        hidden = self.layers[0](embeds, joined, context)
        return hidden, hidden
