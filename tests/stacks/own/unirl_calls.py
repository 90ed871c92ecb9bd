"""UniRL's own HTTP backend, which starts SGLang itself, and its calls, on CPU.

Runs in the environment of `make stacks`, as a program: host, a free port, and the folder of the
model. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from unirl.rollout.engine.sglang.backends.http import HTTPBackend, SRTHTTPError

from tests.stacks.own.ending import end
from tests.stacks.own.policy import NORM, Policy
from tests.support.update_group import GROUP, group_to_form

PROMPTS = [[5, 9, 14, 3] * 4, [7, 21, 8] * 5]
TOKENS = 32
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": TOKENS}


def rollout(backend: Any, policy: Policy) -> dict[str, Any]:
    """Generate with UniRL's function for several prompts; return what it makes of the answers."""
    sampling = SAMPLING | {"ignore_eos": True, "skip_special_tokens": False}
    results = backend.generate(
        [
            {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
            for prompt in PROMPTS
        ]
    )
    gaps = [
        policy.gap(prompt, result.token_ids, result.logprobs)
        for prompt, result in zip(PROMPTS, results, strict=True)
    ]
    return {
        "tokens": [len(result.token_ids) for result in results],
        "reasons": sorted({result.finish_reason for result in results}),
        "gap": max(gaps),
    }


def from_tensor(backend: Any, weight: torch.Tensor) -> None:
    """Send a tensor as UniRL does, without a session."""
    from sglang.srt.utils import MultiprocessingSerializer

    packed = MultiprocessingSerializer.serialize([(NORM, weight)], output_str=True)
    backend.update_from_tensor(
        serialized_named_tensors=[packed], load_format=None, flush_cache=True
    )


def broadcast(backend: Any, weight: torch.Tensor) -> None:
    """Send a tensor through a process group that is formed for it."""
    from sglang.srt.utils.common import init_custom_process_group

    port, body = group_to_form()
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(backend.init_weights_group, **body)
        group = init_custom_process_group(
            backend="gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            world_size=2,
            rank=0,
            group_name=GROUP,
        )
        joined.result()
        sent = thread.submit(
            backend.update_from_distributed,
            names=[NORM],
            dtypes=[str(weight.dtype).removeprefix("torch.")],
            shapes=[list(weight.shape)],
            group_name=GROUP,
            flush_cache=True,
        )
        torch.distributed.broadcast(weight, src=0, group=group)
        sent.result()
    backend.destroy_weights_group(group_name=GROUP)
    torch.distributed.destroy_process_group(group)


def refusal(backend: Any) -> tuple[int, str]:
    """Return the status and the text with which the server refuses to release memory."""
    try:
        backend.release_memory(tags=["kv_cache"])
    except SRTHTTPError as error:
        return error.code, str(error)
    return 200, ""


def calls(backend: Any, url: str, folder: str) -> dict[str, Any]:
    policy = Policy(folder)
    with urllib.request.urlopen(f"{url}/tlt/status") as response:
        (scheduler,) = json.load(response)["schedulers"]
    result: dict[str, Any] = {
        "ping": backend.ping(),
        "strategies": list(scheduler["strategies"]),
        "before": rollout(backend, policy),
    }
    backend.pause()
    from_tensor(backend, policy.step(1.5))
    backend.resume()
    result["after tensors"] = rollout(backend, policy)
    backend.pause()
    broadcast(backend, policy.step(1 / 1.2))
    backend.resume()
    backend.abort()
    backend.flush_cache()
    result["after a broadcast"] = rollout(backend, policy)
    result["release"] = refusal(backend)
    return result


def main() -> None:
    host, port, folder = sys.argv[1:4]
    sharing: Any = torch.multiprocessing
    sharing.set_sharing_strategy("file_system")
    intent = {
        "model_path": folder,
        "host": host,
        "port": int(port),
        "tp_size": 1,
        "device": "cpu",
        "dtype": "float32",
        "mem_fraction_static": 0.9,
        "max_total_tokens": 4096,
        "log_level": "info",
    }
    backend = HTTPBackend.boot(intent, advertise_host=host, concurrency=8)
    try:
        result = calls(backend, f"http://{host}:{port}", folder)
    finally:
        backend.shutdown()
    print(json.dumps(result), flush=True)
    end(0)


if __name__ == "__main__":
    main()
