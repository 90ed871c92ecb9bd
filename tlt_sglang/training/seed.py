"""`tlt seed`: write an untrained drafter, made of the target's last layer, that SGLang loads.

Its vocabulary is the first tokens of the target's: byte-pair tokenizers number them in the order in
which merges were learned, the most frequent ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tlt_sglang import __version__
from tlt_sglang.config import command_line as commands
from tlt_sglang.config.command_line import Parser
from tlt_sglang.errors import ConfigError
from tlt_sglang.models.seed import SEED
from tlt_sglang.training import export
from tlt_sglang.training.models import DraftConfig, Drafter
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.training.target import begin_from
from tlt_sglang.weights import describe

SMALL_VOCAB, LARGE_VOCAB = 8192, 32000
"""Sizes of the draft vocabulary, for targets with fewer than 2**16 tokens and with more."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    return commands.run("seed", _seed, argv)


def _seed(argv: Sequence[str]) -> None:
    parser = Parser("tlt seed", "Create a drafter from the target's last layer.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Folder of the target")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="Folder to write the drafter to"
    )
    if commands.print_help(parser, argv):
        return
    args = parser.parse_args(argv)
    write(args.out, args.model)


def write(folder: Path, model: str) -> None:
    """Write the seed for the target in the folder `model`.

    Raises ConfigError for a target that drafters cannot be trained for, and EnvironmentProblem if
    the seed cannot be written.
    """
    target = describe.target_config(model)
    size = SMALL_VOCAB if target["vocab_size"] < 2**16 else LARGE_VOCAB
    config = DraftConfig.for_target(target, "eagle3", size)
    drafter = Drafter(config)
    layer = describe.layer(model, target["num_hidden_layers"] - 1)
    norm = describe.target_tensor(model, "model.norm.weight")
    embedding, head = describe.embedding_and_head(model)
    if not layer or norm is None:
        raise ConfigError(f"The target {model} has no layers with Llama's names to make a seed of.")
    torch.manual_seed(0)
    begin_from(drafter, {name: weight.float() for name, weight in layer.items()}, norm.float())
    frozen = Frozen.of(embedding, head, vocabulary(target, config.draft_vocab_size))
    export.write(
        folder,
        {
            "config.json": export.config_json(config, target),
            "model.safetensors": export.tensors(config, drafter.state_dict(), frozen),
            SEED: {"target": model, "made by": f"tlt-sglang {__version__}"},
        },
    )


def vocabulary(target: dict[str, Any], size: int) -> torch.Tensor:
    """Return the first `size` tokens, with those that end a text among them."""
    ends = target.get("eos_token_id")
    special = {e for e in (ends if isinstance(ends, list) else [ends]) if isinstance(e, int)}
    first = [token for token in range(target["vocab_size"]) if token not in special]
    return torch.tensor(sorted([*first[: size - len(special)], *special]))
