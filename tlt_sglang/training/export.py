"""Export of a drafter as SGLang loads it: config.json and model.safetensors, all or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.training.models import DraftConfig
from tlt_sglang.training.simulate import Frozen

SGLANG_NAMES = {"eagle": "LlamaForCausalLMEagle", "eagle3": "LlamaForCausalLMEagle3"}


def config_json(config: DraftConfig, target: dict[str, Any]) -> dict[str, Any]:
    """Return the drafter's config.json; every drafter has Llama's shape, whatever its target."""
    fields = {k: v for k, v in asdict(config).items() if k not in ("algorithm", "rope_theta")}
    if config.algorithm == "eagle":
        del fields["draft_vocab_size"]
    return fields | {
        "architectures": [SGLANG_NAMES[config.algorithm]],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": target.get("bos_token_id"),
        "eos_token_id": target.get("eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def vocabulary(draft_ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Return the maps d2t [D], offsets to the target's ids, and t2d [V], tokens with a draft id."""
    has_draft_id = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, draft_ids, True)
    return {"d2t": draft_ids - torch.arange(len(draft_ids)), "t2d": has_draft_id}


def tensors(
    config: DraftConfig, weights: dict[str, Tensor], frozen: Frozen | None
) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors in bfloat16, with the head where `frozen` has it."""
    exported = {name: tensor.detach().bfloat16().cpu() for name, tensor in weights.items()}
    if config.algorithm == "eagle3" and frozen is not None:
        exported["lm_head.weight"] = frozen.head.detach().bfloat16().cpu()
        exported |= vocabulary(frozen.draft_ids.cpu(), config.vocab_size)
    return {name: tensor.contiguous() for name, tensor in exported.items()}


def write(folder: Path, files: dict[str, dict[str, Any] | dict[str, Tensor]]) -> None:
    """Write files into `folder`: tensors where the name ends in .safetensors, JSON elsewhere.

    All are complete before the first is put in place. Raises EnvironmentProblem if that fails, and
    leaves the folder unchanged.
    """
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
        for name, content in files.items():
            if name.endswith(".safetensors"):
                save_file(content, temporary / name, metadata={"format": "pt"})
            else:
                (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        for name in files:
            os.replace(temporary / name, folder / name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise EnvironmentProblem(
            f"The drafter cannot be written to {folder} ({reason}); make room or choose another "
            "folder, then start again."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
