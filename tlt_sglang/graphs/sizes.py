"""Sizes of a target and its drafter, and what follows from them: graph memory and step costs.

These figures serve a plan before anything is captured or measured. The memory of a graph besides
its buffers is an assumption (`NODE_BYTES`) that has not been compared with a GPU.

Pure, and runs in the scheduler process and in `tlt plan`. It looks at no device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import Graph
from tlt_sglang.strategy.acceptance import Acceptance, mix_of
from tlt_sglang.strategy.strategies import Strategy

KERNELS = 11
"""Kernels of a decoder layer in SGLang's graphs of Llama-like models."""
POSITION_BYTES = 16
"""Device memory that an attention backend keeps for each position of a request it can replay: four
tables of int32, as FlashAttention 3 has with pages of one token."""
NODE_BYTES = 96 * 1024
"""Assumed device memory for each kernel of an instantiated graph."""


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a Llama-like target, and its drafter's vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int
    kv_size: int
    """Key heads times head size."""
    draft_vocab: int
    context: int = 0
    """Most positions of a request; 0 leaves out the tables that attention backends keep of them."""

    @staticmethod
    def from_config(config: Mapping[str, Any], draft_vocab: int | None = None) -> ModelSizes:
        """Return the sizes in a config.json; raise ConfigError if the model is not Llama-like."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head_size = config.get("head_dim") or hidden // heads
            return ModelSizes(
                int(config["num_hidden_layers"]),
                hidden,
                int(config["intermediate_size"]),
                int(config["vocab_size"]),
                int(config.get("num_key_value_heads") or heads) * int(head_size),
                draft_vocab or int(config["vocab_size"]),
                int(config.get("max_position_embeddings") or 0),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The model's config.json lacks {error}: plans are made for Llama-like models."
            ) from error

    @property
    def layer_weights(self) -> int:
        """Parameters of a decoder layer."""
        attention = 2 * self.hidden * (self.hidden + self.kv_size)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def target_weights(self) -> int:
        """Parameters that a step of the target reads."""
        return self.layers * self.layer_weights + self.hidden * self.vocab

    @property
    def draft_weights(self) -> int:
        """Parameters that a step of an EAGLE-3 drafter reads."""
        return self.layer_weights + 4 * self.hidden**2 + self.hidden * self.draft_vocab

    def memory(self, graphs: Collection[Graph]) -> int:
        """Return the bytes of graphs: buffers and tables for the largest batch of each shape, and
        nodes."""
        rows: dict[tuple[str, tuple[int, int, int]], int] = {}
        tables: dict[tuple[str, tuple[int, int, int]], int] = {}
        nodes = 0
        for graph in graphs:
            is_target = graph.kind == "verify"
            shape = graph.kind, graph.shape
            rows[shape] = max(rows.get(shape, 0), graph.batch_size * graph.width)
            layers = self.layers if is_target else 1
            steps = graph.shape[0] - 1 if graph.kind == "draft" else 1
            nodes += (layers * KERNELS + 8) * steps
            # Each step of a draft has an attention backend of its own.
            tables[shape] = max(tables.get(shape, 0), graph.batch_size * steps)
        buffers = sum(
            count * self._row_bytes(kind == "verify") for (kind, _), count in rows.items()
        )
        return nodes * NODE_BYTES + buffers + sum(tables.values()) * self.context * POSITION_BYTES

    def _row_bytes(self, is_target: bool) -> int:
        """Return the bytes of a row's activations.

        These are logits in float32 and bfloat16, and those of the widest layer in bfloat16.
        """
        vocab = self.vocab if is_target else self.draft_vocab
        return 6 * vocab + 2 * (6 * self.hidden + 3 * self.intermediate + 2 * self.kv_size)


@dataclass(frozen=True)
class Gpu:
    """The speed of a device."""

    bytes_per_s: float
    flops: float
    """bfloat16, as reached by large products."""
    launch: float = 20e-6
    """Seconds that a graph launch and the host's work around it take."""


GPUS = {
    "a100": Gpu(1.6e12, 2.2e14),
    "h100": Gpu(2.8e12, 5.5e14),
    "h200": Gpu(4.0e12, 5.5e14),
    "b200": Gpu(6.5e12, 1.2e15),
}
"""Published figures less a quarter; for plans only, since the engine measures."""


def step_seconds(sizes: ModelSizes, gpu: Gpu, strategy: Strategy, batch_size: int) -> float:
    """Return the time of a decode step by the roofline, between memory- and compute-bound."""

    def product(weights: int, rows: int) -> float:
        return math.hypot(2 * weights / gpu.bytes_per_s, 2 * weights * rows / gpu.flops)

    total = product(sizes.target_weights, batch_size * strategy.num_draft_tokens) + gpu.launch
    if strategy.num_steps:
        extend = product(sizes.draft_weights, batch_size * strategy.num_draft_tokens)
        draft = product(sizes.draft_weights, batch_size * strategy.topk)
        total += extend + (strategy.num_steps - 1) * draft + 2 * gpu.launch
    return total


def expected_throughput(sizes: ModelSizes, gpu: Gpu, strategy: Strategy, batch_size: int) -> float:
    """Return the tokens a second to expect of an average drafter."""
    tokens = Acceptance().tokens(strategy, mix_of(batch_size), 0)
    return tokens / step_seconds(sizes, gpu, strategy, batch_size)
