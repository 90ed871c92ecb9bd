"""Sizes of a target and its drafter, and what follows from them: graph memory and step costs.

For a plan before anything is captured or measured. What a graph takes besides its buffers is an
assumption (`NODE_BYTES`) until the pool has captured one; it has not been compared with a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import Graph
from tlt_sglang.strategy.acceptance import Acceptance
from tlt_sglang.strategy.arms import Strategy

KERNELS = 11
"""Kernels of a decoder layer in SGLang's graphs of Llama-like models."""
NODE_BYTES = 96 * 1024
"""Of device memory for each kernel of an instantiated graph; assumed."""


@dataclass(frozen=True)
class Sizes:
    """Of a Llama-like target."""

    layers: int
    hidden: int
    inner: int
    vocab: int
    kv_size: int
    """Key heads times head size."""
    draft_vocab: int

    @staticmethod
    def of(config: Mapping[str, Any], draft_vocab: int | None = None) -> Sizes:
        """From a config.json; raises ConfigError where it is of another kind of model."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            head_size = config.get("head_dim") or hidden // heads
            return Sizes(
                int(config["num_hidden_layers"]),
                hidden,
                int(config["intermediate_size"]),
                int(config["vocab_size"]),
                int(config.get("num_key_value_heads") or heads) * int(head_size),
                draft_vocab or int(config["vocab_size"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"The model's config.json tells no {error}: plans are made for Llama-like models."
            ) from error

    @property
    def layer_weights(self) -> int:
        """Parameters of a decoder layer."""
        attention = 2 * self.hidden * (self.hidden + self.kv_size)
        return attention + 3 * self.hidden * self.inner

    @property
    def target_weights(self) -> int:
        """Parameters that a step of the target reads."""
        return self.layers * self.layer_weights + self.hidden * self.vocab

    @property
    def draft_weights(self) -> int:
        """The same of an EAGLE-3 drafter's step."""
        return self.layer_weights + 4 * self.hidden**2 + self.hidden * self.draft_vocab

    def memory(self, graphs: Collection[Graph]) -> int:
        """Bytes of these graphs: buffers for the largest batch of each shape, and their nodes."""
        rows: dict[tuple[str, tuple[int, ...]], int] = {}
        nodes = 0
        for graph in graphs:
            of_target = graph.kind == "verify"
            shape = graph.kind, graph.shape
            rows[shape] = max(rows.get(shape, 0), graph.batch_size * graph.width)
            layers = self.layers if of_target else 1
            steps = graph.shape[0] - 1 if graph.kind == "draft" else 1
            nodes += (layers * KERNELS + 8) * steps
        return nodes * NODE_BYTES + sum(
            count * self._row_bytes(kind == "verify") for (kind, _), count in rows.items()
        )

    def _row_bytes(self, of_target: bool) -> int:
        """Of activations: logits in both precisions, and the widest layer's, in bfloat16."""
        vocab = self.vocab if of_target else self.draft_vocab
        return 6 * vocab + 2 * (6 * self.hidden + 3 * self.inner + 2 * self.kv_size)


@dataclass(frozen=True)
class Gpu:
    """What a device can do."""

    bytes_per_s: float
    flops: float
    """bfloat16, as reached by large products."""
    launch: float = 20e-6
    """Seconds that a graph launch and what is around it take."""


GPUS = {
    "a100": Gpu(1.6e12, 2.2e14),
    "h100": Gpu(2.8e12, 5.5e14),
    "h200": Gpu(4.0e12, 5.5e14),
    "b200": Gpu(6.5e12, 1.2e15),
}
"""By what their makers publish, less a quarter; for plans only: the engine measures."""


def step_seconds(sizes: Sizes, gpu: Gpu, strategy: Strategy, batch_size: int) -> float:
    """A decode step by the roofline: memory-bound or compute-bound, meeting softly."""

    def product(weights: int, rows: int) -> float:
        return math.hypot(2 * weights / gpu.bytes_per_s, 2 * weights * rows / gpu.flops)

    total = product(sizes.target_weights, batch_size * strategy.num_draft_tokens) + gpu.launch
    if strategy.num_steps:
        extend = product(sizes.draft_weights, batch_size * strategy.num_draft_tokens)
        draft = product(sizes.draft_weights, batch_size * strategy.topk)
        total += extend + (strategy.num_steps - 1) * draft + 2 * gpu.launch
    return total


def worth(sizes: Sizes, gpu: Gpu, strategy: Strategy, batch_size: int) -> float:
    """Tokens a second to expect of an average drafter."""
    tokens = Acceptance().tokens(strategy, batch_size, 0)
    return tokens / step_seconds(sizes, gpu, strategy, batch_size)
