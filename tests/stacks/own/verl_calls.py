"""verl's own HTTP client, AsyncHttpServerAdapter, against a running server on CPU.

Runs in the environment of `make stacks`, as a program: host, port, and the folder of the model.
Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import aiohttp
import torch
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.weight_sync.utils import update_weights
from torch.distributed.device_mesh import init_device_mesh
from verl.trainer.ppo.ray_trainer import compute_spec_decode_metrics
from verl.workers.rollout.sglang_rollout.async_sglang_server import _extract_prompt_logprobs_sglang
from verl.workers.rollout.sglang_rollout.http_server_engine import AsyncHttpServerAdapter

from tests.stacks.own.ending import end
from tests.stacks.own.policy import NORM, Policy

PROMPT = [5, 9, 14, 3] * 4
TOKENS = 32
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": TOKENS}
TOP = 2


async def rollout(adapter: Any, policy: Policy) -> dict[str, Any]:
    """Generate as verl does, and shape what its own functions make of the answer."""
    answer = await adapter.async_generate(
        input_ids=PROMPT,
        sampling_params=SAMPLING | {"ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=TOP,
    )
    meta = answer["meta_info"]
    rows = meta["output_token_logprobs"]
    drafted = meta.get("spec_draft_token_num", 0)
    shaped: dict[str, Any] = {}
    _extract_prompt_logprobs_sglang(meta, TOP, len(PROMPT), shaped)
    return {
        "tokens": len(rows),
        "gap": policy.gap(PROMPT, [row[1] for row in rows], [row[0] for row in rows]),
        "prompt_rows": len(shaped["prompt_logprobs"]),
        "drafted": drafted,
        "meters": compute_spec_decode_metrics(
            [drafted],
            [meta.get("spec_accept_token_num", 0)],
            [meta.get("spec_verify_ct", 0)],
        ),
    }


async def update(adapter: Any, weight: torch.Tensor) -> Any:
    """Send a tensor with the adapter's own call, as bytes that SGLang packs."""
    packed = MultiprocessingSerializer.serialize([(NORM, weight)])
    request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[packed], flush_cache=True)
    return await adapter.update_weights_from_tensor(request)


async def refusal(adapter: Any) -> int:
    """Return the status with which the server refuses to release memory."""
    try:
        await adapter.release_memory_occupation(["kv_cache", "weights"])
    except aiohttp.ClientResponseError as error:
        return error.status
    return 200


async def helper_fails(adapter: Any, weight: torch.Tensor) -> str:
    """Return the name of the error of SGLang's function with which verl sends tensors."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("infer_tp",))
    try:
        await update_weights(adapter, [(NORM, weight)], "infer_tp", mesh)
    except Exception as error:
        return type(error).__name__
    finally:
        torch.distributed.destroy_process_group()
    return "none"


async def calls(host: str, port: int, folder: str) -> dict[str, Any]:
    adapter = AsyncHttpServerAdapter(
        launch_server=False, model_path=folder, host=host, port=port, device="cpu"
    )
    policy = Policy(folder)
    result: dict[str, Any] = {
        "models": len((await adapter.available_models())["data"]),
        "before": await rollout(adapter, policy),
    }
    await adapter.flush_cache()
    weight = policy.step(1.5)
    result["update"] = (await update(adapter, weight))["success"]
    result["after"] = await rollout(adapter, policy)
    await adapter.abort_request(abort_all=True)
    result["again"] = await rollout(adapter, policy)
    result["release"] = await refusal(adapter)
    result["helper"] = await helper_fails(adapter, weight)
    return result


def main() -> None:
    host, port, folder = sys.argv[1:4]
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    sharing: Any = torch.multiprocessing
    sharing.set_sharing_strategy("file_system")
    print(json.dumps(asyncio.run(calls(host, int(port), folder))), flush=True)
    end(0)


if __name__ == "__main__":
    main()
