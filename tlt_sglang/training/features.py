"""Features on disk: computed once by the target, read in every epoch.

A folder of safetensors shards, named by the responses they hold (`00000128-00000256.safetensors`),
each written whole and then renamed, so that an interrupted run continues after the last one.
Features are stored in bfloat16: 4.6 kB a token for EAGLE-3 at a hidden size of 576.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.models import DraftConfig
from tlt_sglang.training.target import Target

SHARD = 128
"""Responses in a shard."""


class Features(Sequence[TokenSequence[Tensor]]):
    """The sequences of a folder of shards, read when they are accessed."""

    def __init__(self, folder: Path) -> None:
        """Open every shard. Raises EnvironmentProblem for a damaged one."""
        self.folder = folder
        self.lengths: list[int] = []
        self._rows: list[tuple[Any, int, int, int]] = []  # shard, first token, tokens, prompt
        for path in sorted(folder.glob("*.safetensors")):
            try:
                shard: Any = safe_open(path, "pt")
                lengths = shard.get_tensor("lengths").tolist()
                prompts = shard.get_tensor("prompt_lengths").tolist()
            except (SafetensorError, OSError) as error:
                raise EnvironmentProblem(
                    f"The features {path} are damaged; delete the file and start again."
                ) from error
            first = 0
            for length, prompt in zip(lengths, prompts, strict=True):
                self._rows.append((shard, first, length, prompt))
                self.lengths.append(length)
                first += length

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        shard, first, length, prompt = self._rows[index]

        def rows(name: str) -> Tensor:
            part: Tensor = shard.get_slice(name)[first : first + length]
            return part

        last = rows("last") if "last" in shard.keys() else None  # noqa: SIM118
        return TokenSequence(rows("ids").long(), rows("features"), prompt, last)


def compute(
    folder: Path,
    responses: Sequence[Response],
    target: Target,
    config: DraftConfig,
    progress: Callable[[int], None],
) -> Features:
    """Return the features of `responses`, computing missing ones; `progress` gets tokens done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.glob("*.tmp"):
            unfinished.unlink()
        for first in range(0, len(responses), SHARD):
            part = responses[first : first + SHARD]
            path = folder / f"{first:08d}-{first + len(part):08d}.safetensors"
            if not path.exists():
                for other in folder.glob(f"{first:08d}-*.safetensors"):
                    other.unlink()  # of a shorter corpus
                _write(path, target, part, config)
            progress(sum(len(response.ids) for response in part))
    except OSError as error:
        raise EnvironmentProblem(
            f"Cannot write features to {folder} ({error.strerror}); make room, then start again: "
            "finished shards are kept."
        ) from error
    return Features(folder)


def _write(path: Path, target: Target, responses: Sequence[Response], config: DraftConfig) -> None:
    # Sorted by length for the forward passes, stored in the order of the responses.
    order = sorted(range(len(responses)), key=lambda i: len(responses[i].ids))
    by_index: dict[int, TokenSequence[Tensor]] = {}
    indices = iter(order)
    for group in target.sequences([responses[i] for i in order], config):
        for sequence in group:
            by_index[next(indices)] = sequence
    sequences = [by_index[i] for i in range(len(responses))]
    tensors = {
        "ids": torch.cat([d.ids for d in sequences]).to(torch.int32),
        "features": torch.cat([d.features for d in sequences]),
        "lengths": torch.tensor([len(d) for d in sequences], dtype=torch.int32),
        "prompt_lengths": torch.tensor([d.prompt_length for d in sequences], dtype=torch.int32),
    }
    if config.algorithm == "eagle3":
        tensors["last"] = torch.cat([d.head_input for d in sequences])
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, SafetensorError):
            raise OSError(28, str(error)) from error
        raise
    temporary.rename(path)
