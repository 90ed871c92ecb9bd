"""`tlt train`: from a target and prompts to a drafter, in stages that resume where they stopped.

    1. responses   the target's own responses, at each of the temperatures  work/responses.jsonl
    2. features    the target's hidden states of every response             work/features/
    3. training    with checkpoints                                         work/checkpoints/
    4. export      config.json, model.safetensors, training.json

Everything is in the folder `--out`; `work/` can be deleted once the drafter is exported.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tlt_sglang import __version__
from tlt_sglang.errors import ConfigError
from tlt_sglang.models.named import resolve_model
from tlt_sglang.training import export, features, provenance, responses
from tlt_sglang.training.checkpoints import Checkpoints
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.curve import Curve
from tlt_sglang.training.models import Algorithm, DraftConfig, Drafter
from tlt_sglang.training.progress import Bar, say
from tlt_sglang.training.responses import rank
from tlt_sglang.training.target import Target, frequent_tokens, initialise
from tlt_sglang.training.trainer import Trainer, TrainerSettings
from tlt_sglang.weights import describe

SAVE_SECONDS = 120.0


@dataclass(frozen=True)
class TrainOptions:
    """The options of `tlt train`."""

    model: str
    data: Path
    out: Path
    algorithm: Algorithm
    settings: TrainerSettings
    draft_vocab_size: int
    temperatures: tuple[float, ...]
    max_new_tokens: int
    at_once: int
    start_from: Path | None


def train(options: TrainOptions) -> Path:
    """Train a drafter, or continue an interrupted run; return the drafter's folder."""
    # The models.
    device = _join_device()
    torch.manual_seed(options.settings.seed)
    half = options.settings.precision == "bfloat16"
    target = Target(resolve_model(options.model), device, half)
    config = DraftConfig.for_target(target.config, options.algorithm, options.draft_vocab_size)
    drafter = Drafter(config).to(device)
    if options.start_from is not None:
        load_weights(drafter, options.start_from)

    # The data: responses, and the target's hidden states of them.
    work = options.out / "work"
    provenance.check_same_run(work, options)
    everything = responses.collect(options, target, work / "responses.jsonl")
    trained, held_out = responses.split(everything)
    say(
        f"{len(trained)} responses to train on, {len(held_out)} held out, "
        f"{sum(len(r.output) for r in everything)} response tokens"
    )
    frozen = target.frozen(_draft_ids(options, config, trained))
    training_set = _features(work / "features", trained, target, config, "features")
    held_out_set = _features(work / "held-out", held_out, target, config, "held-out features")
    if options.start_from is None:
        initialise(drafter, target)
    del target

    # The training.
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        fully_shard(drafter)
    lengths = training_set.lengths
    trainer = Trainer(drafter, frozen, training_set, lengths, options.settings, device)
    curve = Curve(trainer, held_out_set, held_out)
    _train(trainer, Checkpoints(work / "checkpoints"), curve)
    _export(options, curve, config, responses.counts(trained))
    return options.out


# -- the stages ------------------------------------------------------------------------------------


def _draft_ids(
    options: TrainOptions, config: DraftConfig, trained: Sequence[Response]
) -> torch.Tensor:
    """Return the draft vocabulary: that of `--start-from`, or the most frequent tokens."""
    if options.start_from is not None:
        draft_ids = describe.draft_ids(options.start_from, config.vocab_size)
        if len(draft_ids) == config.draft_vocab_size:
            return draft_ids
    texts = (response.ids for response in trained)
    return frequent_tokens(texts, config.draft_vocab_size, config.vocab_size)


def _features(
    folder: Path, texts: list[Response], target: Target, config: DraftConfig, label: str
) -> features.Features:
    """Return the features of `texts`; the first process computes those that are missing."""
    if rank() == 0:
        with Bar(label, sum(len(response.ids) for response in texts)) as bar:
            features.compute(folder, texts, target, config, bar.advance)
    if dist.is_initialized():
        dist.barrier()
    return features.Features(folder)


def _train(trainer: Trainer, checkpoints: Checkpoints, curve: Curve) -> None:
    if checkpoints.load(curve.state, curve.restore):
        say(f"continuing from step {trainer.progress.step}")
    saved = time.monotonic()
    with Bar("training", 1000) as bar, _Interrupt() as interrupt:
        for report in trainer.run():
            curve.add(report)
            bar.at(int(1000 * report.done), curve.line(report))
            if time.monotonic() - saved > SAVE_SECONDS:
                checkpoints.save(trainer.progress.step, curve.state())
                saved = time.monotonic()
            if interrupt.received:
                break
    if trainer.progress.step:
        checkpoints.save(trainer.progress.step, curve.state())
        checkpoints.finish()
    if interrupt.received:
        raise KeyboardInterrupt


class _Interrupt:
    """Lets Ctrl-C end training between two steps; a second one ends it at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def _export(
    options: TrainOptions,
    curve: Curve,
    config: DraftConfig,
    counts: Mapping[str, Mapping[str, int]],
) -> None:
    """Write the drafter, with where it comes from in training.json."""
    lengths = curve.evaluate()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(curve.trainer.drafter, options=whole)
    if rank() != 0:
        return
    target_config = Target(resolve_model(options.model), torch.device("cpu")).config
    export.write(
        options.out,
        {
            "config.json": export.config_json(config, target_config),
            "model.safetensors": export.tensors(config, weights, curve.trainer.frozen),
            "training.json": {
                "made by": f"tlt train, tlt-sglang {__version__}, torch {torch.__version__}",
                "options": provenance.options_json(options),
                "data": counts,
                "accept_length": lengths,
                "curve": curve.to_json(),
                "started_from": provenance.training_json(options.start_from),
            },
        },
    )
    say(f"accept length on held-out responses, chain of 3: {lengths}")


# -- helpers ---------------------------------------------------------------------------------------


def load_weights(drafter: Drafter, folder: Path) -> None:
    """Load the trained weights of an exported drafter. Raises ConfigError if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The drafter {folder} cannot be read ({error}).") from error
    if wrong := drafter.unfit(weights):
        raise ConfigError(
            f"The drafter {folder} has another shape: {wrong[0]} does not fit; start from one with "
            "the same --algorithm and target."
        )
    drafter.take(weights)


def _join_device() -> torch.device:
    """Return this process's device; under torchrun, join the other processes first."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device
