"""How published weights get into the drafter that SGLang runs. Runs in the scheduler process.

SGLang's own loader writes them into the parameters' storage, so that graphs, tensor-parallel shards
and fused matrices stay as they are. Embedding and head of the drafter are never written: they are
the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang.errors import TltError

if TYPE_CHECKING:
    from tlt_sglang.config.settings import Device
    from tlt_sglang.upstream.protocols import EagleWorker, ModelRunner
    from tlt_sglang.weights.swap import Weights

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def dtype_name(runner: ModelRunner) -> str:
    """Return safetensors' name of the dtype that a model runs in."""
    return _DTYPES[runner.dtype]


def copier(worker: EagleWorker, device: Device) -> Callable[[Weights], None]:
    """Return a function that writes published weights into the drafter's own storage.

    Raises TltError if a trained weight shares its storage with the target.
    """
    draft_model: Any = worker._draft_worker.draft_runner.model
    target_model = worker.target_worker.model_runner.model

    # Embedding and head may be shared with the target; anything else must be the drafter's own.
    shared = {parameter.data_ptr() for parameter in target_model.parameters()}
    head = getattr(draft_model, "lm_head", None)
    frozen = {id(p) for p in head.parameters()} if head is not None else set()
    frozen |= {id(p) for n, p in draft_model.named_parameters() if "embed_tokens" in n}
    trained = [parameter for parameter in draft_model.parameters() if id(parameter) not in frozen]
    if any(parameter.data_ptr() in shared for parameter in trained):
        raise TltError(
            "A trained weight of this drafter shares its memory with the target, so it cannot be "
            "swapped; leave --tlt-store out for this drafter."
        )

    @torch.no_grad()
    def copy_in(weights: Weights) -> None:
        draft_model.load_weights(iter(weights.items()))
        if device == "cpu":
            from tlt_sglang.cpu import linear

            for parameter in trained:
                if linear.packed(parameter):
                    linear.repack(parameter)

    return copy_in


def stager(device_name: str, device: Device) -> Callable[[Weights], Weights]:
    """Return a function that brings weights to the drafter's device, on a stream of its own."""
    if device == "cpu":
        return lambda weights: weights

    def stage(weights: Weights) -> Weights:
        cuda: Any = torch.cuda
        stream = cuda.Stream()
        with torch.cuda.stream(stream):
            staged = {name: tensor.to(device_name) for name, tensor in weights.items()}
        stream.synchronize()  # blocks the watching thread, not the engine
        return staged

    return stage
