"""The adaptive drafter's part of one engine: what it logs, which version drafts, what it reports.

Made where `--tlt-store` names a store of drafter versions. Called by the patches around decode
steps, and when the scheduler is idle; whatever goes wrong outside the engine (no sidecar, no
coordinator, a bad version, a full disk) changes nothing but the drafter's freshness.

Runs in the scheduler process.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tlt_sglang.config.settings import Config, Device
from tlt_sglang.coordinator.client import Client
from tlt_sglang.engine import first_rank
from tlt_sglang.errors import TltError
from tlt_sglang.harvest import announce, segments
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.harvest.tap import Tap
from tlt_sglang.harvest.writer import Writer
from tlt_sglang.models.seed import SEED
from tlt_sglang.weights import describe
from tlt_sglang.weights.store import Store
from tlt_sglang.weights.swap import Swap, Weights

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.05
"""Between two reports to the coordinator."""
VERSION_KEY = "drafter_version"
"""In a request's `meta_info`: the versions that drafted for it, in order."""


class Live:
    """Of one engine; raises ConfigError or EnvironmentProblem if it cannot do what is asked."""

    def __init__(self, config: Config, device: Device, worker: Any) -> None:
        """`worker` is SGLang's EAGLEWorkerV2."""
        assert config.store_path is not None
        self._worker, self._device = worker, device
        self.store = Store(config.store_path)
        target, draft = worker.target_worker.model_runner, worker._draft_worker.draft_runner
        args = draft.server_args
        folder = Path(args.speculative_draft_model_path)
        self.seed = (folder / SEED).exists()
        shape = describe.target_config(args.model_path)
        expected = describe.expected(folder, shape, _dtype(draft))
        self._harvests = config.harvests
        self.tap: Tap | None = None
        self.announced: Announcement | None = None
        self._requests: deque[list[str]] = deque()
        self._dirty = False
        self._committed = 0
        self._end: list[Callable[[], None]] = []
        self.swap = Swap(
            self.store,
            expected,
            describe.load(folder),
            _copier(worker, device),
            stage=_stager(draft.device, device),
            agree=first_rank.exchange(),
        )
        self.swap.look()  # what is there already is used from the first step on
        self.between_steps()
        self.swap.begin()
        self._end.append(self.swap.end)
        if config.harvests and first_rank.is_first():
            self._log(config, args, folder, expected.architecture, shape, target)
        atexit.register(self.end)

    def _log(
        self, config: Config, args: Any, folder: Path, kind: str, shape: dict[str, Any], target: Any
    ) -> None:
        segments.remove_stale()
        announce.read(self.store.root)  # removes what killed engines have announced
        size = shape["hidden_size"] * (4 if kind == "eagle3" else 1)
        writer = Writer.create(int(config.harvest_gb * 1e9), size, "bfloat16")
        self._end.append(writer.close)
        writer.sampling = config.harvest_rate
        self.tap = Tap(writer, torch.device(target.device))
        self.announced = Announcement(
            str(writer.path),
            device_name(config, self._device),
            str(Path(args.model_path).resolve()),
            str(folder.resolve()),
            self.seed,
        )
        path = self.announced.write(self.store.root)
        self._end.append(lambda: announce.remove(self.store.root, path))

    def report_to(self, config: Config, scheduler: Any) -> None:
        """Tell the coordinator how much this engine has to do, from a thread."""
        if config.coordinator is None:
            return
        name = device_name(config, self._device)
        key = None if config.coordinator_key is None else Path(config.coordinator_key)
        client = Client(config.coordinator, f"engine@{os.getpid()}", "engine", name, key=key)
        stop = threading.Event()

        def watch() -> None:
            rate, committed = 0.0, 0
            while not stop.wait(REPORT_SECONDS):
                now = self._committed
                rate, committed = 0.9 * rate + 0.1 * (now - committed) / REPORT_SECONDS, now
                batch = scheduler.running_batch
                running = len(batch.reqs) if batch is not None and batch.reqs else 0
                client.report(running, len(scheduler.waiting_queue), round(rate, 1))
            client.close()

        thread = threading.Thread(target=watch, name="tlt-report", daemon=True)
        thread.start()
        self._end += [thread.join, stop.set]

    def end(self) -> None:
        """Leave nothing behind."""
        while self._end:
            self._end.pop()()

    # -- around the steps ------------------------------------------------------------------------

    @property
    def drafts(self) -> bool:
        """Whether the drafter is worth being asked: a seed is not."""
        return not self.seed or self.swap.version > 0

    def between_steps(self) -> None:
        """A decode step is about to begin."""
        if self._dirty:
            self._target_changed()
        self.swap.between_steps()

    def idle(self) -> None:
        """Nothing runs."""
        if self.tap is not None:
            self.tap.drain()
        if self.swap.alone:
            self.between_steps()

    def prefilled(
        self,
        batch: Any,
        tokens: torch.Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        output: Any,
    ) -> None:
        """The target has read `tokens` of prompts; `output` is SGLang's LogitsProcessorOutput."""
        if self.tap is not None and output.hidden_states is not None:
            self.tap.prefill(
                batch.reqs, tokens, starts, counts, output.hidden_states, output.last_hidden_states
            )

    def decoded(self, batch: Any, result: Any) -> None:
        """A step is verified: before the drafter's own pass, when `batch` is as it was verified."""
        self._requests.append([request.rid for request in batch.reqs])
        for request in batch.reqs:
            _add_version(request, self.swap.version)
        if self.tap is None or not batch.reqs:
            return
        from sglang.srt.speculative.eagle_worker_common import _compact_accept_to_front

        size, width = len(batch.reqs), result.speculative_num_draft_tokens
        output = result.logits_output
        first = batch.spec_info.draft_token.view(size, width)[:, :1].to(torch.int64)
        sampled = result.next_token_ids.view(size, width).to(torch.int64)
        last = output.last_hidden_states
        if last is not None and batch.spec_info.topk > 1:
            last = _compact_accept_to_front(last, result.accept_index, size, num_draft_tokens=width)
        self.tap.decode(
            batch.reqs,
            torch.cat([first, sampled[:, :-1]], dim=1),
            batch.seq_lens,
            result.accept_lens,
            output.hidden_states,
            last,
        )

    def verified(
        self, accepted: Sequence[int], strategy: str | None, repeating: Sequence[int] = ()
    ) -> None:
        """Drafts accepted in the oldest step not told yet; `strategy` if a drafter made them, but
        for those of requests that were `repeating` themselves."""
        requests = self._requests.popleft() if self._requests else []
        self._committed += len(accepted) + sum(accepted)
        if strategy is not None and len(requests) == len(accepted):
            drafted = [place for place in range(len(accepted)) if place not in repeating]
            self.swap.observe(
                [requests[place] for place in drafted],
                [accepted[place] for place in drafted],
                strategy,
            )

    # -- the target ------------------------------------------------------------------------------

    def target_updated(self) -> None:
        """Its weights have changed, or some of them; more may follow before the next step."""
        self._dirty = True

    def _target_changed(self) -> None:
        self._dirty = False
        self.swap.target_changed()
        if not self._harvests:
            return
        model = self._worker.target_worker.model_runner.model
        parts = [part.detach() for part in model.get_embed_and_head()]
        tied = parts[0].data_ptr() == parts[1].data_ptr()
        whole = [first_rank.gathered(part.bfloat16().cpu()) for part in parts[: 1 if tied else 2]]
        embedding, head = whole[0], whole[-1]
        if self.tap is None or embedding is None or head is None:
            return  # another rank's
        self.tap.forget()
        version = self.tap.version
        threading.Thread(
            target=self._publish_heads, args=(version, embedding, head), daemon=True
        ).start()

    def _publish_heads(self, version: int, embedding: torch.Tensor, head: torch.Tensor) -> None:
        """Write what the sidecar trains against, and say so; on a thread."""
        from safetensors.torch import save

        from tlt_sglang.weights import files

        assert self.announced is not None
        path = announce.heads_path(self.store.root, version)
        tied = torch.equal(embedding, head)
        data = save({"embedding": embedding} if tied else {"embedding": embedding, "head": head})
        try:
            with files.usable(self.store.root):
                files.write(path, data)
            before = self.announced.heads
            self._announce(target_version=version, heads=str(path))
            if before:
                Path(before).unlink(missing_ok=True)
        except TltError as error:
            logger.warning("%s Training goes on when the target is updated again.", error)

    def _announce(self, **changes: Any) -> None:
        assert self.announced is not None
        self.announced = dataclasses.replace(self.announced, **changes)
        self.announced.write(self.store.root)

    # -- for people ------------------------------------------------------------------------------

    def act(self, order: dict[str, Any]) -> None:
        """What `POST /tlt/drafter` asks for; see `status.drafter_order`."""
        if order.get("reject"):
            self.swap.reject()
        else:
            self.swap.pin(order["version"])

    def status(self) -> dict[str, Any]:
        """For `GET /tlt/status`."""
        return {
            "store": str(self.store.root),
            "drafter_version": self.swap.version,
            "drafter_ready": self.drafts,
            "swap": self.swap.status(),
            "harvest": None if self.tap is None else self.tap.status(),
        }


def _add_version(request: Any, version: int) -> None:
    """Put the version that drafts into what SGLang reports of a request."""
    if request.customized_info is None:
        request.customized_info = {}
    used = request.customized_info.setdefault(VERSION_KEY, [])
    if not used or used[-1] != version:
        used.append(version)


def device_name(config: Config, device: Device) -> str:
    """What the coordinator calls this engine's device."""
    if config.device_name is not None:
        return config.device_name
    host = os.uname().nodename
    if device == "cpu":
        return f"{host}:cpu{'-'.join(map(str, sorted(os.sched_getaffinity(0))))}"
    from sglang.srt.runtime_context import get_parallel

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return f"{host}:gpu{visible or get_parallel().tp_group.local_rank}"


def _dtype(runner: Any) -> str:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return names[runner.dtype]


def _copier(worker: Any, device: Device) -> Callable[[Weights], None]:
    """Writes published weights into the drafter's own storage.

    Raises TltError if a weight that is trained shares its storage with the target.
    """
    model = worker._draft_worker.draft_runner.model
    target = worker.target_worker.model_runner.model
    theirs = {parameter.data_ptr() for parameter in target.parameters()}
    head = getattr(model, "lm_head", None)
    fixed = {id(p) for p in head.parameters()} if head is not None else set()
    fixed |= {id(p) for n, p in model.named_parameters() if "embed_tokens" in n}
    own = [parameter for parameter in model.parameters() if id(parameter) not in fixed]
    if any(parameter.data_ptr() in theirs for parameter in own):
        raise TltError(
            "A weight of the drafter is the target's own and must not be swapped; leave "
            "--tlt-store out for this drafter."
        )

    @torch.no_grad()
    def copy_in(weights: Weights) -> None:
        model.load_weights(iter(weights.items()))
        if device == "cpu":
            from tlt_sglang.cpu import linear

            for parameter in own:
                if linear.packed(parameter):
                    linear.repack(parameter)

    return copy_in


def _stager(where: Any, device: Device) -> Callable[[Weights], Weights]:
    """Brings weights to the drafter's device, on a stream of its own."""
    if device == "cpu":
        return lambda weights: weights

    def stage(weights: Weights) -> Weights:
        cuda: Any = torch.cuda
        stream = cuda.Stream()
        with torch.cuda.stream(stream):
            staged = {name: tensor.to(where) for name, tensor in weights.items()}
        stream.synchronize()  # of the thread that looks, not of the engine
        return staged

    return stage
