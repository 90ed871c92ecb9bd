"""`tlt train`: from a target and prompts to a drafter, in steps that resume where they stopped.

    1. responses   the target's own answers, at the temperatures asked for  work/responses.jsonl
    2. features    the target's hidden states of all of it                  work/features/
    3. training    with checkpoints                                         work/checkpoints/
    4. export      config.json, model.safetensors, training.json

Everything lies in the folder `--out`; `work/` can be deleted when the drafter is done.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tlt_sglang import __version__
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.models.named import resolve_model
from tlt_sglang.training import corpus, evaluate, export, features, generate
from tlt_sglang.training.checkpoints import Checkpoints
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.models import Algorithm, DraftConfig, Drafter
from tlt_sglang.training.progress import Bar, say
from tlt_sglang.training.target import Target, frequent_tokens, initialise
from tlt_sglang.training.trainer import Report, Settings, Trainer
from tlt_sglang.weights import describe

SAVE_SECONDS = 120.0
EVALUATE_SECONDS = 180.0
EVALUATED = 40
"""Held-out sequences that the curve is drawn from; the end is told from all of them."""


@dataclass(frozen=True)
class Options:
    """What `tlt train` was asked for."""

    model: str
    data: Path
    out: Path
    algorithm: Algorithm
    settings: Settings
    draft_vocab_size: int
    temperatures: tuple[float, ...]
    max_new_tokens: int
    at_once: int
    start_from: Path | None


def train(options: Options) -> Path:
    """Train a drafter, or go on with it; its folder."""
    device = _device()
    torch.manual_seed(options.settings.seed)
    half = options.settings.precision == "bfloat16"
    target = Target(resolve_model(options.model), device, half)
    config = DraftConfig.for_target(target.config, options.algorithm, options.draft_vocab_size)
    drafter = Drafter(config).to(device)
    if options.start_from is not None:
        load_weights(drafter, options.start_from)
    work = options.out / "work"
    _same_run(work, options)
    responses = _responses(options, target, work / "responses.jsonl")
    trained, held_out = _split(responses)
    say(
        f"{len(trained)} responses to train on, {len(held_out)} held out, "
        f"{sum(len(r.output) for r in responses)} response tokens"
    )
    frozen = target.frozen(_draft_ids(options, config, trained))
    learned = _features(work / "features", trained, target, config, "features")
    unseen = _features(work / "held-out", held_out, target, config, "held-out features")
    if options.start_from is None:
        initialise(drafter, target)
    del target
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        fully_shard(drafter)
    trainer = Trainer(drafter, frozen, learned, learned.lengths, options.settings, device)
    watch = _Watch(trainer, unseen, held_out)
    watch.data = _counts(trained)
    _train(trainer, Checkpoints(work / "checkpoints"), watch)
    return _export(options, trainer, watch, config)


# -- the steps -------------------------------------------------------------------------------------


def _responses(options: Options, target: Target, path: Path) -> list[Response]:
    """Those of the data, and the target's own to prompts that have none."""
    wanted: list[generate.Request] = []
    given: list[Response] = []
    for number, item in enumerate(corpus.read_data(options.data, target.encode, target.chat)):
        if isinstance(item, Response):
            given.append(item)
            continue
        at = options.temperatures[number % len(options.temperatures)]
        wanted.append(generate.Request(item, at, options.max_new_tokens))
    if wanted and _rank() == 0:
        _generate(options, wanted, path, target.path)
    if dist.is_initialized():
        dist.barrier()
    own = {(r.prompt.key, r.temperature): r for r in corpus.read_responses(path)}
    found = given + [own[_key(request)] for request in wanted]
    if not any(len(response.output) > 1 for response in found):
        raise ConfigError(f"The data {options.data} leads to no response tokens to learn from.")
    return [response for response in found if len(response.output) > 1]


def _generate(options: Options, wanted: list[generate.Request], path: Path, model: str) -> None:
    there = {(r.prompt.key, r.temperature) for r in corpus.read_responses(path)}
    unique = {_key(request): request for request in wanted}
    missing = [request for key, request in unique.items() if key not in there]
    if not missing:
        return
    # Greedy requests in a batch of sampled ones make SGLang sort every row's vocabulary.
    missing.sort(key=lambda request: request.temperature)
    with (
        generate.serve(model, options.at_once, say) as server,
        Bar("responses", len(missing)) as bar,
    ):

        def counted() -> Iterator[Response]:
            tokens, started = 0, time.monotonic()
            for response in server.answers(missing):
                tokens += len(response.output)
                bar.advance(1, f"{tokens / (time.monotonic() - started):.0f} tokens/s")
                yield response

        corpus.append_responses(path, counted())


def _key(request: generate.Request) -> tuple[str, float]:
    return request.prompt.key, request.temperature


def _split(responses: list[Response]) -> tuple[list[Response], list[Response]]:
    """(to train on, held out); by prompt, so that no prompt is in both."""
    held_out = [response for response in responses if response.prompt.held_out]
    trained = [response for response in responses if not response.prompt.held_out]
    if not held_out or not trained:
        keys = sorted({response.prompt.key for response in responses})
        if len(keys) < 2:
            raise ConfigError("The data has one prompt; give at least two, one to be held out.")
        out = set(keys[: max(1, len(keys) // corpus.HELD_OUT)])
        held_out = [response for response in responses if response.prompt.key in out]
        trained = [response for response in responses if response.prompt.key not in out]
    return trained, held_out


def _draft_ids(options: Options, config: DraftConfig, trained: list[Response]) -> torch.Tensor:
    """The draft vocabulary: that of the drafter a run goes on from, or the most frequent tokens."""
    if options.start_from is not None:
        known = describe.draft_ids(options.start_from, config.vocab_size)
        if len(known) == config.draft_vocab_size:
            return known
    texts = (response.ids for response in trained)
    return frequent_tokens(texts, config.draft_vocab_size, config.vocab_size)


def _features(
    folder: Path, responses: list[Response], target: Target, config: DraftConfig, what: str
) -> features.Features:
    if _rank() == 0:
        with Bar(what, sum(len(response.ids) for response in responses)) as bar:
            features.compute(folder, responses, target, config, bar.advance)
    if dist.is_initialized():
        dist.barrier()
    return features.Features(folder)


def _train(trainer: Trainer, checkpoints: Checkpoints, watch: _Watch) -> None:
    if checkpoints.load(watch.state, watch.restore):
        say(f"going on from step {trainer.progress.step}")
    saved = time.monotonic()
    with Bar("training", 1000) as bar, _Interrupt() as interrupt:
        for report in trainer.run():
            watch.see(report)
            bar.at(int(1000 * report.done), watch.line(report))
            if time.monotonic() - saved > SAVE_SECONDS:
                checkpoints.save(trainer.progress.step, watch.state())
                saved = time.monotonic()
            if interrupt.asked:
                break
    if trainer.progress.step:
        checkpoints.save(trainer.progress.step, watch.state())
        checkpoints.finish()
    if interrupt.asked:
        raise KeyboardInterrupt


class _Interrupt:
    """Ctrl-C during training ends it between two steps; a second one at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _Watch:
    """The curve of a run: loss, and accept length on held-out responses now and then."""

    def __init__(
        self, trainer: Trainer, unseen: features.Features, held_out: list[Response]
    ) -> None:
        self.trainer = trainer
        self.groups = evaluate.by_kind(unseen, [_kind(r) for r in held_out], len(held_out))
        self.temperatures = {_kind(r): r.temperature for r in held_out}
        self.data: dict[str, dict[str, int]] = {}
        self.curve: list[dict[str, Any]] = []
        self.loss = 0.0

    def state(self) -> dict[str, Any]:
        return self.trainer.state() | {"curve": json.dumps(self.curve)}

    def restore(self, state: dict[str, Any]) -> None:
        self.curve = json.loads(state.pop("curve"))
        self.trainer.restore(state)

    def see(self, report: Report) -> None:
        self.loss = report.loss if not self.loss else 0.95 * self.loss + 0.05 * report.loss
        last = self.curve[-1]["seconds"] if self.curve else 0.0
        if report.progress.seconds - last > EVALUATE_SECONDS:
            self.evaluate(EVALUATED)

    def evaluate(self, most: int | None = None) -> dict[str, float]:
        """Add a point to the curve."""
        trainer, progress = self.trainer, self.trainer.progress
        lengths = {
            kind: round(
                evaluate.accept_length(
                    trainer.drafter,
                    trainer.frozen,
                    sequences[:most],
                    steps=3,
                    temperature=self.temperatures[kind],
                ).mean,
                4,
            )
            for kind, sequences in sorted(self.groups.items())
        }
        self.curve.append(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                "seconds": round(progress.seconds, 1),
                "loss": round(self.loss, 4),
                "accept_length": lengths,
            }
        )
        return lengths

    def line(self, report: Report) -> str:
        accept = self.curve[-1]["accept_length"] if self.curve else {}
        told = ", ".join(f"{kind} {length:.2f}" for kind, length in accept.items())
        return f"loss {self.loss:.3f}, {report.tokens_per_s:.0f} tokens/s, accept {told or '-'}"


def _export(options: Options, trainer: Trainer, watch: _Watch, config: DraftConfig) -> Path:
    lengths = watch.evaluate()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(trainer.drafter, options=whole)
    if _rank() == 0:
        target_config = Target(resolve_model(options.model), torch.device("cpu")).config
        export.write(
            options.out,
            {
                "config.json": export.config_json(config, target_config),
                "model.safetensors": export.tensors(config, weights, trainer.frozen),
                "training.json": {
                    "made by": f"tlt train, tlt-sglang {__version__}, torch {torch.__version__}",
                    "options": _told(options),
                    "data": watch.data,
                    "accept_length": lengths,
                    "curve": watch.curve,
                    "started_from": _training(options.start_from),
                },
            },
        )
        say(f"accept length on held-out responses, chain of 3: {lengths}")
    return options.out


# -- what is around them ---------------------------------------------------------------------------


def load_weights(drafter: Drafter, folder: Path) -> None:
    """The trainable weights of an exported drafter; raises ConfigError where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The drafter {folder} cannot be read ({error}).") from error
    if wrong := drafter.unfit(weights):
        raise ConfigError(f"The drafter {folder} has another shape: {wrong[0]} does not fit.")
    drafter.take(weights)


def _same_run(work: Path, options: Options) -> None:
    """Raise ConfigError if `work` belongs to a run with other options."""
    told = _told(options)
    path = work / "run.json"
    try:
        if path.exists():
            before = json.loads(path.read_text())
            other = sorted(k for k in told if before.get(k) != told[k] and k != "at_once")
            if other:
                raise ConfigError(
                    f"{options.out} holds a run with another {', '.join(other)}; go on with the "
                    "same, or choose another --out."
                )
            return
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"{path} cannot be used ({error}).") from error


def _told(options: Options) -> dict[str, Any]:
    """The options as JSON has them."""
    told: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    del told["out"]
    return told


def _training(folder: Path | None) -> dict[str, Any] | None:
    """The training.json of the drafter that a run went on from."""
    if folder is None or not (folder / "training.json").exists():
        return None
    told: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return told


def _counts(responses: list[Response]) -> dict[str, dict[str, int]]:
    """How much there is of every kind."""
    found: dict[str, dict[str, int]] = {}
    for response in responses:
        of_kind = found.setdefault(_kind(response), {"responses": 0, "tokens": 0})
        of_kind["responses"] += 1
        of_kind["tokens"] += len(response.output)
    return found


def _kind(response: Response) -> str:
    return f"{response.prompt.kind} t={response.temperature:g}"


def _device() -> torch.device:
    """This process's device; joins the other processes of a torchrun."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
