"""The object that joins TLT's parts inside one engine process, and what it tells of itself.

One per process that has TLT on, made by the plugin. In the scheduler process it is attached to
SGLang's scheduler once that has been built. Importing it imports nothing of SGLang.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from tlt_sglang import __version__
from tlt_sglang.config.arguments import settle
from tlt_sglang.config.config import VARIABLE, Config, Device
from tlt_sglang.engine import first_rank
from tlt_sglang.engine.telemetry import EventLog, Metrics, Sink, Telemetry
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.plan import Plan
from tlt_sglang.graphs.planned import BATCH_SIZES, described, planned
from tlt_sglang.models import seed
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.strategy.arms import Strategy, parse

logger = logging.getLogger(__name__)


@dataclass
class Engine:
    """TLT in this process: its configuration, its patches, and SGLang's scheduler if here."""

    config: Config
    device: Device
    patcher: Patcher
    asked: Config | None = None
    """The configuration as it was before what it leaves open was chosen."""
    scheduler: Any = field(default=None, repr=False)
    rollout: Any = field(default=None, repr=False)
    """`tlt_sglang.engine.step.Rollout`, where there are several strategies."""
    telemetry: Telemetry | None = field(default=None, repr=False)
    """Where SGLang verifies drafts."""
    sampled: Any = field(default=None, repr=False)
    """`tlt_sglang.sampling.rejection.Sampled`, where drafts of chains are sampled."""
    live: Any = field(default=None, repr=False)
    """`tlt_sglang.engine.online_drafter.Live`, where there is a store of drafter versions."""

    def settle(self, args: Any) -> None:
        """In the process that starts SGLang: choose what the configuration leaves open, for this
        process and those it starts. Another engine in the same process chooses anew."""
        self.asked = self.asked or self.config
        if seed.grows(self.asked, args):
            args.speculative_draft_model_path = str(seed.make(args.model_path, self.asked))
        settled = settle(self.asked, args, self.device)
        if settled != self.config:
            self.config = settled
            os.environ[VARIABLE] = settled.to_json()

    def attach(self, scheduler: Any) -> None:
        """Called when SGLang's scheduler stands; every patch must be in force by now.

        Raises PatchError if another plugin has undone one.
        """
        self.patcher.verify()
        self.scheduler = scheduler
        if self.telemetry is None and scheduler.draft_worker is not None:
            strategy = parse(str(_speculation(scheduler)["strategy"]))
            self.telemetry = self._telemetry([strategy])
        if self.live is not None and first_rank.is_first():
            self.live.report_to(self.config, scheduler)

    def sample_drafts(self, worker: Any) -> None:
        """SGLang's EAGLE worker is there, and no graphs yet: whether its chains are sampled."""
        from sglang.srt.runtime_context import get_spec

        spec = get_spec()
        automatic = "on" if self.device == "cpu" else "off"
        asked = {"auto": automatic}.get(self.config.draft_sampling, self.config.draft_sampling)
        shapes = [arm.topk for arm in self.config.pool if arm.num_steps] or [worker.topk]
        learned = spec.speculative_algorithm in ("EAGLE", "EAGLE3")
        thresholds = spec.speculative_accept_threshold_single, spec.speculative_accept_threshold_acc
        if asked == "off" or not learned or 1 not in shapes or thresholds != (1, 1):
            return
        from tlt_sglang.sampling.rejection import Sampled

        self.sampled = Sampled(worker._draft_worker, worker.topk)

    def capturing(self, topk: int) -> contextlib.AbstractContextManager[None]:
        """The surroundings in which graphs of strategies with `topk` branches are captured."""
        if self.sampled is None:
            return contextlib.nullcontext()
        from tlt_sglang.sampling.rejection import flag

        return flag(topk == 1)

    def begin_rollout(self, worker: Any) -> None:
        """SGLang's EAGLE worker stands; several strategies get their states now."""
        if self.device == "cpu" and self.config.draft_dtype == "auto":
            _narrow_drafter(worker)
        if self.config.store is not None:
            from tlt_sglang.engine.online_drafter import Live

            self.live = Live(self.config, self.device, worker)
        pool = self.config.pool
        if len(pool) < 2:
            return
        from sglang.srt.runtime_context import get_schedule

        from tlt_sglang.engine.clocks import CudaEvents, Wall
        from tlt_sglang.engine.driver import Driver
        from tlt_sglang.engine.step import Rollout, agreed
        from tlt_sglang.graphs.states import States
        from tlt_sglang.strategy import policies
        from tlt_sglang.strategy.trace import Recorded

        plan = self._plan(worker)
        possible = None if plan is None else _of_pool(plan.strategies, pool)
        if self.live is not None and self.live.seed:
            possible = self._grown(possible)
        policy = policies.make(self.config, pool, possible)
        if self.config.trace is not None and first_rank.is_first():
            policy = Recorded(policy, _trace(self.config.trace))
        self.telemetry = self._telemetry(pool)
        driver = Driver(
            agreed(policy, pool),
            Wall() if self.device == "cpu" else CudaEvents(),
            rests=self.config.policy == "cost-model",
        )
        states = States(worker, pool, plan.captured() if plan else None, self.capturing)
        self.rollout = Rollout(
            states,
            driver,
            self.telemetry,
            ngram_memory_mb=self.config.ngram_memory_mb,
            backlog_mb=self.config.backlog_mb,
            sampled=self.sampled,
            possible=possible,
            up_to_date=get_schedule().disable_overlap_schedule,
        )

    def _grown(
        self, possible: Callable[[int], Sequence[Strategy]] | None
    ) -> Callable[[int], Sequence[Strategy]]:
        """`possible` without what the drafter does, as long as that is a seed."""
        pool = self.config.pool

        def grown(batch_size: int) -> Sequence[Strategy]:
            known = pool if possible is None else possible(batch_size)
            return [arm for arm in known if self.live.drafts or not arm.num_steps]

        return grown

    def _plan(self, worker: Any) -> Plan | None:
        """Which graphs the strategies get, told in the log as a table.

        None where nothing is to be planned: on CPU, which has no graphs, and for a model of which
        the sizes are not known.
        """
        from sglang.srt.runtime_context import get_exec

        most = worker.target_worker.model_runner.max_running_requests
        graphs = get_exec().graph.cuda_graph_config
        sizes = (graphs.decode.bs if graphs is not None else None) or BATCH_SIZES
        try:
            plan = planned(
                self.config.pool,
                worker.target_worker.model_config.hf_text_config.to_dict(),
                draft_vocab=worker._draft_worker.draft_runner.model_config.vocab_size,
                batch_sizes=sorted({min(size, most) for size in sizes}),
                max_batch=self.config.max_batch,
                budget_gb=self.config.graph_memory_gb,
            )
        except ConfigError as error:
            if self.config.graph_memory_gb is not None:
                raise
            logger.info("No plan of graphs: %s", error)
            return None
        on_cpu = self.device == "cpu"
        said = "none is captured on CPU" if on_cpu else "captured as planned"
        logger.info("Graphs, %s:\n%s", said, described(plan))
        return None if on_cpu else plan

    def _telemetry(self, strategies: Sequence[Strategy]) -> Telemetry:
        """With what the configuration and SGLang's flags ask for, on one rank."""
        from sglang.srt.runtime_context import get_observability

        sinks: list[Sink] = []
        if first_rank.is_first():
            if self.config.events is not None:
                sinks.append(EventLog(self.config.events))
            if get_observability().enable_metrics:
                sinks.append(Metrics())
        return Telemetry(strategies, sinks)

    def observe(self, num_correct_drafts: Sequence[int]) -> None:
        """A verify step is complete: drafts accepted per request, the bonus token not counted."""
        strategy, repeating = None, ()
        if self.rollout is not None:
            strategy, repeating = self.rollout.verified(num_correct_drafts)
        elif self.telemetry is not None:
            strategy = next(iter(self.telemetry.tallies))
            self.telemetry.step(strategy, num_correct_drafts)
        if self.live is not None:
            learned = strategy is not None and strategy.num_steps
            told = str(strategy) if learned else None
            self.live.verified(num_correct_drafts, told, repeating)

    def act(self, order: dict[str, Any]) -> bool:
        """Do what `POST /tlt/...` asks for (see `status`); whether that is possible."""
        if "strategy" in order and self.rollout is not None:
            self.rollout.pin(int(order["strategy"]))
        elif "calibrate" in order and self.rollout is not None:
            self.rollout.calibrate(order["calibrate"])
            if self.live is not None and self.live.tap is not None:
                self.live.tap.paused = order["calibrate"]
        elif "drafter" in order and self.live is not None:
            self.live.act(order["drafter"])
        elif "harvest" in order and self.live is not None and self.live.tap is not None:
            self.live.tap.writer.sampling = order["harvest"]
        else:
            return False
        return True

    def status(self) -> dict[str, Any]:
        """What `GET /tlt/status` reports for this process; JSON-able."""
        status: dict[str, Any] = {"pid": os.getpid(), "patches": self.patcher.report()}
        if self.scheduler is not None:
            status |= _speculation(self.scheduler)
            if self.rollout is not None:
                status |= {"policy": self.config.policy} | self.rollout.report()
            status |= self._figures()
            if self.live is not None:
                status |= self.live.status()
        return status

    def _figures(self) -> dict[str, Any]:
        if self.telemetry is None:
            return {"rounds": 0}
        tallies = self.telemetry.tallies.values()
        rounds = sum(tally.rounds for tally in tallies)
        told: dict[str, Any] = {"strategies": self.telemetry.report(), "rounds": rounds}
        if rounds:
            accepted = sum(tally.accepted for tally in tallies)
            told["accept_length"] = round(1 + accepted / rounds, 4)
        return told


current: Engine | None = None
"""The engine of this process; None while TLT is off."""


def start(engine: Engine) -> None:
    """Make `engine` the one of this process."""
    global current
    current = engine


def versions() -> dict[str, str]:
    """Versions a bug report needs."""
    return {"tlt_sglang": __version__} | {
        name: version(name) for name in ("sglang", "torch", "transformers")
    }


def _of_pool(
    possible: Callable[[int], Sequence[Strategy]], pool: Sequence[Strategy]
) -> Callable[[int], Sequence[Strategy]]:
    """`possible` without strategies outside the pool: a plan always holds plain decoding.

    Where nothing of the pool was planned for a batch size, the whole pool is allowed: it runs
    without graphs there.
    """

    def allowed(batch_size: int) -> Sequence[Strategy]:
        return [one for one in possible(batch_size) if one in pool] or pool

    return allowed


def _narrow_drafter(worker: Any) -> None:
    """Let the drafter's own weights be read in eight bits; the target's that it shares stay."""
    from tlt_sglang.cpu import linear

    target = worker.target_worker.model_runner.model.parameters()
    shared = {parameter.data_ptr() for parameter in target}
    model = worker._draft_worker.draft_runner.model
    own = [parameter for parameter in model.parameters() if parameter.data_ptr() not in shared]
    body = getattr(model, "model", None)
    for part in (getattr(model, "lm_head", None), getattr(body, "fc", None)):
        weight = getattr(part, "weight", None)
        if weight is not None and any(weight is parameter for parameter in own):
            linear.repack(weight)  # which SGLang does not pack, or not before it is used
    linear.narrow(own)


def _trace(path: str) -> Callable[[str], object]:
    """What writes a line of the policy's trace; raises ConfigError if it cannot."""
    to_file, broken = _writer(path), False

    def write(line: str) -> None:
        nonlocal broken
        try:
            if not broken:
                to_file(line)
        except OSError as error:  # the engine goes on; a trace with a gap would replay to nothing
            broken = True
            logger.warning("The trace %s ends here (%s)", path, error.strerror)

    return write


def _writer(path: str) -> Callable[[str], object]:
    """What writes to a new file, line by line; raises ConfigError."""
    try:
        return open(path, "w", buffering=1, encoding="utf-8").write
    except OSError as error:
        raise ConfigError(
            f"The trace {path} cannot be written ({error.strerror}); give --tlt-trace another file."
        ) from error


def _speculation(scheduler: Any) -> dict[str, Any]:
    """Strategy and drafter, read off SGLang's scheduler."""
    args = scheduler.server_args
    worker = scheduler.draft_worker
    status: dict[str, Any] = {"strategy": "off", "drafter": None, "accept_length": None}
    if worker is None:
        return status
    algorithm = str(args.speculative_algorithm or "").lower()
    tokens = worker.speculative_num_draft_tokens
    if algorithm == "ngram":
        status |= {"strategy": f"ngram:{tokens}", "drafter": "ngram"}
    else:
        shape = f"{worker.speculative_num_steps}x{worker.topk}x{tokens}"
        status |= {
            "strategy": f"{algorithm}:{shape}",
            "drafter": args.speculative_draft_model_path,
        }
    return status
