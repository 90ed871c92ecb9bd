"""The target for offline training: transformers' model, its features, embedding and head.

Features are what SGLang passes to its drafters (`hidden_states` of a prefill or a verify step): for
EAGLE the hidden state after the last norm, for EAGLE-3 the inputs of three layers side by side.
`tests/engine/test_drafter_parity.py` compares the two.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlt_sglang.errors import ConfigError
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.models import DraftConfig, Drafter, captured_layers
from tlt_sglang.training.simulate import Frozen


class Target:
    """A target's tokenizer and weights, loaded on first use."""

    def __init__(self, path: str, device: torch.device, half: bool = False) -> None:
        """With `half`, matrix products are in bfloat16 on CPU, too; the residual stream is not."""
        self.path = path
        self.half = half
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> Any:
        """Return transformers' model, frozen, in float32 on CPU and bfloat16 on CUDA."""
        if self._model is None:
            from transformers import AutoModelForCausalLM

            try:
                model = AutoModelForCausalLM.from_pretrained(self.path, dtype=self.dtype)
            except (OSError, ValueError, RuntimeError) as error:
                reason = (str(error).splitlines() or [""])[0].rstrip(".")
                raise ConfigError(f"The target {self.path} cannot be loaded ({reason}).") from error
            self._model = model.to(self.device).eval().requires_grad_(False)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Return transformers' tokenizer."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.path)
            except (OSError, ValueError) as error:
                raise ConfigError(f"The target {self.path} has no tokenizer.") from error
        return self._tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """Return its config.json."""
        if self._model is None and (Path(self.path) / "config.json").exists():
            config: dict[str, Any] = json.loads((Path(self.path) / "config.json").read_text())
            return config
        from transformers import AutoConfig

        fields: dict[str, Any] = AutoConfig.from_pretrained(self.path).to_dict()
        return fields

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens may be spelled out in it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Return the messages in the chat template, up to the start of the answer."""
        text: str = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return text

    def frozen(self, draft_ids: Tensor) -> Frozen:
        """Return its embedding and head, for a drafter with the tokens `draft_ids`."""
        model = self.model
        embedding = model.get_input_embeddings().weight.detach()
        head = model.get_output_embeddings().weight.detach()
        return Frozen.of(embedding, head, draft_ids.to(self.device))

    def sequences(
        self, responses: Sequence[Response], config: DraftConfig, budget: int = 1024
    ) -> Iterator[list[TokenSequence[Tensor]]]:
        """Yield the sequences of `responses` with their features, in order, some at a time.

        Responses run padded to the longest of a group; padding follows the tokens, which do not
        attend to it.
        """
        group: list[Response] = []
        longest = 0
        for response in responses:
            longest = max(longest, len(response.ids))
            if group and longest * (len(group) + 1) > budget:
                yield self._sequences(group, config)
                group, longest = [], len(response.ids)
            group.append(response)
        if group:
            yield self._sequences(group, config)

    @torch.inference_mode()
    def _sequences(self, group: list[Response], config: DraftConfig) -> list[TokenSequence[Tensor]]:
        lengths = [len(response.ids) for response in group]
        ids = torch.zeros(len(group), max(lengths), dtype=torch.int64)
        for row, response in zip(ids, group, strict=True):
            row[: len(response.ids)] = torch.tensor(response.ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            states = self.model.model(
                ids.to(self.device), output_hidden_states=True, use_cache=False
            ).hidden_states
        last = states[-1]
        features = last
        if config.algorithm == "eagle3":
            layers = captured_layers(len(states) - 1)
            features = torch.cat([states[layer] for layer in layers], dim=-1)
        return [
            TokenSequence(
                ids[i, :length].clone(),
                features[i, :length].bfloat16().cpu(),
                len(group[i].prompt.ids),
                last[i, :length].bfloat16().cpu() if features is not last else None,
            )
            for i, length in enumerate(lengths)
        ]


def frequent_tokens(texts: Iterable[Sequence[int]], size: int, vocab_size: int) -> Tensor:
    """Return the `size` most frequent tokens, ascending; ties are broken by lower id."""
    counts: Counter[int] = Counter()
    for ids in texts:
        counts.update(ids)
    order = sorted(range(vocab_size), key=lambda token: (-counts[token], token))
    return torch.tensor(sorted(order[:size]))


def initialise(drafter: Drafter, target: Target) -> None:
    """Initialise a drafter from the target's last layer; see `begin_from`."""
    model = target.model.model
    begin_from(drafter, dict(model.layers[-1].named_parameters()), model.norm.weight)


@torch.no_grad()
def begin_from(drafter: Drafter, target_layer: Mapping[str, Tensor], norm: Tensor) -> None:
    """Initialise a drafter from the target's last layer and norm, which do most of its task.

    EAGLE-3's inputs are twice as wide: the half that reads the hidden state is the target's, the
    half that reads the embedding starts at zero, and `fc` passes the highest of the features on.
    Where shapes or names differ (another MLP, say) the random initialisation stays.
    """
    size = drafter.config.hidden_size
    layer = drafter.layers[0]
    for name, ours in layer.named_parameters():
        weight = target_layer.get(
            "input_layernorm.weight" if name.startswith("hidden_norm") else name
        )
        if weight is None or name.startswith("input_layernorm"):
            continue
        if weight.shape == ours.shape:
            ours.copy_(weight)
        elif weight.dim() == 2 and ours.shape == (weight.shape[0], 2 * weight.shape[1]):
            ours.zero_()[:, size:].copy_(weight)
    torch.nn.init.normal_(drafter.fc.weight, std=0.1 * size**-0.5)
    drafter.fc.weight[:, -size:] += torch.eye(size)
    if drafter.config.algorithm == "eagle3":
        drafter.norm.weight.copy_(norm)
    else:
        drafter.fc.bias.zero_()
