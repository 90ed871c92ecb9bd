"""Build the parts of a speculation step once SGLang's EAGLE worker stands.

`draft_noise` is asked before SGLang captures its graphs, which read from it; the rest is built
after that: the online drafter, then the pool with its graphs, its policy and its telemetry.

Runs in the scheduler process.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tlt_sglang import upstream
from tlt_sglang.config.settings import Config, Device
from tlt_sglang.engine import first_rank
from tlt_sglang.engine.telemetry import EventLog, Metrics, Sink, Telemetry
from tlt_sglang.errors import ConfigError
from tlt_sglang.graphs.model_plan import BATCH_SIZES, plan_for_model, plan_table
from tlt_sglang.graphs.plan import CapturePlan
from tlt_sglang.strategy.policy import AllowedStrategies
from tlt_sglang.strategy.strategies import Strategy

if TYPE_CHECKING:
    from tlt_sglang.engine.online_drafter import OnlineDrafter
    from tlt_sglang.engine.pool import Pool
    from tlt_sglang.engine.step import SpeculationStep
    from tlt_sglang.sampling.draft_noise import DraftNoise
    from tlt_sglang.upstream.protocols import EagleWorker

logger = logging.getLogger(__name__)

GPU_DWELL = 4
"""Steps for which tensor-parallel ranks on GPUs keep a choice: to exchange one takes a tenth of a
millisecond of the host, which a small model's step does not leave."""


def draft_noise(config: Config, device: Device, worker: EagleWorker) -> DraftNoise | None:
    """Return the noise of coupled sampling for SGLang's own drafting on CUDA, or None.

    Called before SGLang captures graphs, which read from it.
    """
    learned = upstream.current().spec().speculative_algorithm in ("EAGLE", "EAGLE3")
    if config.sampling != "coupled" or device == "cpu" or not learned:
        return None
    from tlt_sglang.sampling.draft_noise import DraftNoise

    size = max(*_captured_sizes(), worker.target_worker.model_runner.max_running_requests)
    return DraftNoise(worker._draft_worker, size)


def _captured_sizes() -> Sequence[int]:
    """Return the batch sizes to capture: those of SGLang, or on CPU those that it would.

    Of a long list, as SGLang's default one, these are the sizes for which memory is reserved: a
    pool captures several graphs for each, and a start would take minutes longer.
    """
    sizes = upstream.current().captured_sizes() or BATCH_SIZES
    if len(sizes) <= len(BATCH_SIZES):
        return sizes
    return sorted({*sizes} & {*BATCH_SIZES, max(sizes)})


def drafter_capture(
    config: Config, device: Device, step: SpeculationStep
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which SGLang's drafter captures its graphs.

    The flags of several strategies are as large as all of them together, so that none would use
    their graphs: until the strategies of `step` are known, nothing is captured.
    """
    if captures_later(config, device) and step.telemetry is None:
        from tlt_sglang.graphs.states import nothing_captured

        return nothing_captured()
    return contextlib.nullcontext()


def captures_later(config: Config, device: Device) -> bool:
    """Return whether graphs of decode steps are captured by the pool, not at SGLang's start."""
    return device == "cuda" and len(config.pool) > 1


def pool(
    config: Config,
    device: Device,
    worker: EagleWorker,
    telemetry: Telemetry,
    online_drafter: OnlineDrafter | None,
) -> Pool:
    """Return the pool of an engine with several strategies; captures their graphs on a GPU."""
    from tlt_sglang.engine.clocks import CudaEvents, Wall
    from tlt_sglang.engine.driver import Driver
    from tlt_sglang.engine.pool import Pool, agreed
    from tlt_sglang.graphs.states import RuntimeStates
    from tlt_sglang.strategy import policies
    from tlt_sglang.strategy.trace import TracedPolicy

    # Which strategies a batch size may have: those with graphs, and with a drafter that is trained.
    strategies = config.pool
    graphs = plan(config, device, worker)
    allowed = None if graphs is None else _within(graphs.strategies, strategies)
    if online_drafter is not None and online_drafter.is_seed:
        allowed = _once_trained(allowed, strategies, online_drafter)

    policy = policies.make(config, strategies, allowed)
    if config.trace is not None and first_rank.is_first():
        policy = TracedPolicy(policy, _trace(config.trace))
    driver = Driver(
        agreed(policy, strategies, 1 if device == "cpu" else GPU_DWELL),
        Wall() if device == "cpu" else CudaEvents(),
        plain_runs=config.policy == "cost-model",
    )
    states = RuntimeStates(
        worker,
        strategies,
        None if graphs is None else graphs.captured(),
        started=not captures_later(config, device),
    )
    return Pool(
        states,
        driver,
        telemetry,
        ngram_memory_mb=config.ngram_memory_mb,
        pending_mb=config.pending_memory_mb,
        allowed=allowed,
    )


def plan(config: Config, device: Device, worker: EagleWorker) -> CapturePlan | None:
    """Return which graphs the strategies get, and print it to the log as a table.

    None where nothing is planned: on CPU, which has no graphs, and for a model of unknown sizes.
    """
    model = worker.target_worker.model_config
    max_requests = worker.target_worker.model_runner.max_running_requests
    try:
        made = plan_for_model(
            config.pool,
            model.hf_text_config.to_dict() | {"max_position_embeddings": model.context_len},
            draft_vocab=worker._draft_worker.draft_runner.model_config.vocab_size,
            batch_sizes=sorted({min(size, max_requests) for size in _captured_sizes()}),
            max_batch=config.max_batch,
            budget_gb=config.graph_memory_gb,
        )
    except ConfigError as error:
        if config.graph_memory_gb is not None:
            raise
        logger.info("No plan of graphs: %s", error)
        return None
    on_cpu = device == "cpu"
    state = "none is captured on CPU" if on_cpu else "captured as planned"
    logger.info("Graphs, %s:\n%s", state, plan_table(made))
    return None if on_cpu else made


def telemetry(config: Config, strategies: Sequence[Strategy]) -> Telemetry:
    """Return telemetry with the sinks that configuration and SGLang's flags name, on one rank."""
    sinks: list[Sink] = []
    if first_rank.is_first():
        if config.events is not None:
            sinks.append(EventLog(config.events))
        if upstream.current().has_metrics():
            sinks.append(Metrics())
    return Telemetry(strategies, sinks)


def narrow_drafter(worker: EagleWorker) -> None:
    """Store the drafter's own weights in eight bits; those it shares with the target stay."""
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


def _within(planned: AllowedStrategies, strategies: Sequence[Strategy]) -> AllowedStrategies:
    """Return `planned` without strategies outside the pool: a plan always holds `off`.

    Where nothing of the pool was planned for a batch size, all of it is allowed: it runs without
    graphs there.
    """

    def allowed(batch_size: int) -> Sequence[Strategy]:
        return [one for one in planned(batch_size) if one in strategies] or strategies

    return allowed


def _once_trained(
    allowed: AllowedStrategies | None, strategies: Sequence[Strategy], online_drafter: OnlineDrafter
) -> AllowedStrategies:
    """Return `allowed` without the drafter's strategies for as long as it is an untrained seed."""

    def trained(batch_size: int) -> Sequence[Strategy]:
        present = strategies if allowed is None else allowed(batch_size)
        return [one for one in present if online_drafter.can_draft or not one.num_steps]

    return trained


def _trace(path: str) -> Callable[[str], object]:
    """Return what writes a line of the policy's trace; raise ConfigError if it cannot."""
    write_line, broken = _writer(path), False

    def write(line: str) -> None:
        nonlocal broken
        try:
            if not broken:
                write_line(line)
        except OSError as error:  # the engine goes on; a trace with a gap would replay to nothing
            broken = True
            logger.warning("The trace %s ends here (%s)", path, error.strerror)

    return write


def _writer(path: str) -> Callable[[str], object]:
    """Return what writes to a new file, line by line; raise ConfigError."""
    try:
        return open(path, "w", buffering=1, encoding="utf-8").write
    except OSError as error:
        raise ConfigError(
            f"The trace {path} cannot be written ({error.strerror}); give --tlt-trace another file."
        ) from error
