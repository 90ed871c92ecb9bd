"""miles' own engine actor and rollout against a running server, with a router before it, on CPU.

Runs in the environment of `make stacks`, as a program: the server's host and port, the router's
port, and the folder of the model. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import torch
from miles.backends.sglang_utils.sglang_engine import SGLangEngine
from miles.rollout.sglang_rollout import generate
from miles.utils.http_utils import init_http_client
from miles.utils.types import Sample

from tests.stacks.own.ending import end
from tests.stacks.own.policy import NORM, Policy
from tests.support.update_group import GROUP, group_to_form

TOKENS = 32
SAMPLES = 4
CHANGED = "b"


def arguments(host: str, port: int, folder: str) -> Namespace:
    """Return miles' arguments: an engine that it does not start, behind a router."""
    return Namespace(
        hf_checkpoint=folder,
        chat_template_path=None,
        seed=1,
        env_report=None,
        rollout_external=True,
        colocate=True,
        offload_rollout=False,
        num_gpus_per_node=1,
        rollout_num_gpus=1,
        rollout_num_gpus_per_engine=1,
        fp16=False,
        use_rollout_routing_replay=False,
        use_miles_router=False,
        use_distributed_post=False,
        partial_rollout=False,
        ci_test=False,
        sglang_dp_size=1,
        sglang_pp_size=1,
        sglang_ep_size=1,
        sglang_server_concurrency=SAMPLES,
        sglang_speculative_algorithm="EAGLE3",
        sglang_router_ip=host,
        sglang_router_port=port,
        sglang_router_policy=None,
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        rollout_max_response_len=TOKENS,
        rollout_stop=None,
        rollout_stop_token_ids=None,
        rollout_skip_special_tokens=False,
    )


def rollout(args: Namespace, policy: Policy) -> dict[str, Any]:
    """Generate with miles' own function; return what its samples show."""
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": TOKENS}

    async def run() -> list[Any]:
        samples = [Sample(index=i, prompt=f"Story {i}: once upon a time") for i in range(SAMPLES)]
        made = [generate(args, sample, sampling | {"ignore_eos": True}) for sample in samples]
        return list(await asyncio.gather(*made))

    samples = LOOP.run_until_complete(run())
    gaps = []
    for sample in samples:
        start = len(sample.tokens) - sample.response_length
        answer = sample.tokens[start:]
        gaps.append(policy.gap(sample.tokens[:start], answer, sample.rollout_log_probs))
    return {
        "tokens": [sample.response_length for sample in samples],
        "status": sorted({sample.status.value for sample in samples}),
        "versions": sorted({version for sample in samples for version in sample.weight_versions}),
        "accepted": sum(sample.spec_info.spec_accept_token_num for sample in samples),
        "drafted": sum(sample.spec_info.spec_draft_token_num for sample in samples),
        "verify_steps": sum(sample.spec_info.spec_verify_ct for sample in samples),
        "gap": max(gaps),
    }


LOOP = asyncio.new_event_loop()
"""miles' HTTP client belongs to one event loop."""


def broadcast(engine: Any, weight: torch.Tensor, version: str) -> Any:
    """Send a tensor through a process group that is formed for it; miles' own is NCCL's."""
    from sglang.srt.utils.common import init_custom_process_group

    port, body = group_to_form()
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(engine.init_weights_update_group, **body)
        group = init_custom_process_group(
            backend="gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=2,
            rank=0,
            group_name=GROUP,
        )
        assert joined.result()["success"]
        answer = thread.submit(
            engine.update_weights_from_distributed,
            [NORM],
            [weight.dtype],
            [list(weight.shape)],
            GROUP,
            weight_version=version,
        )
        torch.distributed.broadcast(weight, src=0, group=group)
        done = answer.result()
    engine.destroy_weights_update_group(GROUP)
    torch.distributed.destroy_process_group(group)
    return done


def refusal(engine: Any) -> tuple[int, str]:
    """Return the status and the text with which the server refuses to release memory."""
    try:
        engine.release_memory_occupation()
    except requests.HTTPError as error:
        return error.response.status_code, error.response.text
    return 200, ""


def main() -> None:
    host, port, router_port, folder = sys.argv[1:5]
    args = arguments(host, int(router_port), folder)
    init_http_client(args)
    policy = Policy(folder)
    engine = SGLangEngine(args, rank=0)
    engine.init(dist_init_addr=f"{host}:1", port=int(port), nccl_port=1, host=host)
    result: dict[str, Any] = {"health": engine.health_generate(30.0)}

    engine.pause_generation()
    engine.flush_cache()
    result["broadcast"] = broadcast(engine, policy.step(1.5), CHANGED)["success"]
    engine.continue_generation()
    result["version"] = engine.get_weight_version()
    result["after broadcast"] = rollout(args, policy)

    policy.step(1 / 1.5)
    result["disk"] = engine.update_weights_from_disk(folder)["success"]
    result["after disk"] = rollout(args, policy)
    engine.update_weight_version("c")
    result["named version"] = engine.get_weight_version()
    result["release"] = refusal(engine)
    print(json.dumps(result), flush=True)
    end(0)


if __name__ == "__main__":
    main()
