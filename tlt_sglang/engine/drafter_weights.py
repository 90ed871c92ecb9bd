"""How published weights get into the drafter that SGLang runs. Runs in the scheduler process.

Versions are held in host memory, pinned on CUDA: SGLang has given the device's memory to weights
and KV cache, and may release all of it while an RL stack trains.

SGLang's own loader writes them into the parameters' storage, so that graphs, tensor-parallel shards
and fused matrices stay as they are. Embedding and head of the drafter are never written: they are
the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tlt_sglang import upstream
from tlt_sglang.errors import TltError

if TYPE_CHECKING:
    from tlt_sglang.config.settings import Device
    from tlt_sglang.upstream.protocols import EagleWorker, ModelRunner
    from tlt_sglang.upstream.weight_updates import UpdateManager
    from tlt_sglang.weights.swap import Weights

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def dtype_name(runner: ModelRunner) -> str:
    """Return safetensors' name of the dtype that a model runs in."""
    return _DTYPES[runner.dtype]


def writable(updater: UpdateManager) -> bool:
    """Return whether the weights may be written: none are released, or being updated."""
    return upstream.current().update_session(updater) is None and not updater.offload_tags


def copier(worker: EagleWorker, device: Device) -> Callable[[Weights], None]:
    """Return a function that writes published weights into the drafter's own storage.

    Raises TltError if a trained weight shares its storage with the target.
    """
    runner = worker._draft_worker.draft_runner
    draft_model: Any = runner.model
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
        # One tensor at a time, and without waiting: the device has room for no whole version.
        draft_model.load_weights(
            (name, tensor.to(runner.device, non_blocking=True)) for name, tensor in weights.items()
        )
        if device == "cpu":
            from tlt_sglang.cpu import linear

            for parameter in trained:
                if linear.packed(parameter):
                    linear.repack(parameter)

    return copy_in


def stager(device: Device) -> Callable[[Weights], Weights]:
    """Return a function that prepares weights on a thread for `copier`: on CUDA it pins them."""
    if device == "cpu":
        return lambda weights: weights
    return lambda weights: {name: tensor.pin_memory() for name, tensor in weights.items()}
