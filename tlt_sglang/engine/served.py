"""Checks of what SGLang has built, where flags and files did not show it.

`check` runs before graphs are captured: the class of the worker, and the drafter as it is loaded.
`require_parts` runs once SGLang's scheduler stands. Runs in the scheduler process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.config.refusals import FeatureName, require_started
from tlt_sglang.config.refused import refuse_drafter
from tlt_sglang.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from tlt_sglang.config.settings import Config, Device
    from tlt_sglang.engine.step import SpeculationStep
    from tlt_sglang.upstream.protocols import EagleWorker, ModelRunner

WORKER = "sglang.srt.speculative.eagle_worker_v2"
"""The module of the worker that our patches extend; a subclass may lay out its states otherwise."""

PARTS: tuple[FeatureName, ...] = ("pool", "store")
"""The features that need a worker of ours. Coupled sampling does without one: drafts are chosen
without the noise then."""


def check(config: Config, device: Device, worker: EagleWorker) -> None:
    """Raise ConfigError if the worker or its drafter excludes a feature of TLT that is on."""
    runner = worker._draft_worker.draft_runner
    if type(worker).__module__ != WORKER:
        require_started(config, PARTS, f"by {type(worker).__name__}")
    refuse_drafter(config, runner.model_config.hf_config.to_dict(), device)
    if config.store is not None:
        _require_unquantised(runner.model)


def require_parts(config: Config, step: SpeculationStep, worker: object | None) -> None:
    """Raise ConfigError if a part of a step is configured and did not come up with a `worker`."""
    parts = {"pool": step.pool, "store": step.online_drafter}
    missing = [name for name in PARTS if parts[name] is None]
    served = "without a drafter" if worker is None else f"by {type(worker).__name__}"
    require_started(config, missing, served)


def recapture_problem(
    device: Device, step: SpeculationStep, *, recapture_cuda_graph: bool = False, **_: object
) -> str | None:
    """Return why SGLang must not capture its graphs anew for an update of the weights, if so."""
    if device == "cpu" or step.pool is None or not recapture_cuda_graph:
        return None
    return (
        "recapture_cuda_graph does not work with several strategies, each of which has graphs of "
        "its own; leave it out, as an update changes weights in place."
    )


def features_width(runner: ModelRunner, kind: str, hidden_size: int) -> int:
    """Return the width of a token's hidden states in the log, for a drafter of `kind`.

    They are what SGLang feeds the drafter, and for EAGLE-3 the target's last hidden state, of
    `hidden_size`, beside it.
    """
    from sglang.srt.speculative.eagle_utils import get_draft_input_from_target_hidden_dim

    width: int = get_draft_input_from_target_hidden_dim(runner)
    return width + hidden_size if kind == "eagle3" else width


def _require_unquantised(model: torch.nn.Module) -> None:
    """Raise ConfigError if a layer of the drafter is quantised: versions are copied as they are."""
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None and "Unquantized" not in type(method).__name__:
            raise ConfigError(
                f"The drafter's {name} is quantised ({type(method).__name__}), so published "
                "versions cannot be swapped in; use --speculative-draft-model-quantization unquant "
                "with a drafter that is not quantised, or leave --tlt-store out."
            )
