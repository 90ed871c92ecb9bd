"""AReaL's own trainer and client against a running server: calls, then GRPO steps, on CPU.

Runs in the environment of `make stacks`, as a program: the address of a server, the folder of the
model, and what to do. `disk` and `xccl` make single calls and train with such weight updates;
`calls` makes the calls alone, `generate` those that a router passes on, and `killed` dies before it
continues what it has paused. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from areal.api import FinetuneSpec, ModelAllocation, ModelRequest, WeightUpdateMeta
from areal.api.cli_args import (
    GenerationHyperparameters,
    InferenceEngineConfig,
    MicroBatchSpec,
    NameResolveConfig,
    NormConfig,
    OptimizerConfig,
    PPOActorConfig,
)
from areal.engine.fsdp_engine import FSDPPPOActor
from areal.engine.sglang_remote import RemoteSGLangEngine
from areal.utils import name_resolve
from areal.workflow.rlvr import RLVRWorkflow
from transformers import AutoTokenizer

from tests.stacks.own.ending import end

STEPS = 2
NAMES = {"experiment_name": "conformance", "trial_name": "one"}
TOPICS = ["the sea", "a train"]
HYPERPARAMETERS = GenerationHyperparameters(max_new_tokens=32, temperature=1.0, n_samples=1)


def input_ids(data: str, tokenizer: Any, enable_thinking: bool) -> list[int]:
    """Return the prompt's tokens; the model has no chat template."""
    ids: list[int] = tokenizer(data)["input_ids"]
    return ids


def reward(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], **data: Any
) -> float:
    """Reward answers with many different tokens."""
    return len(set(completion_ids)) / max(1, len(completion_ids))


def rollout_client(address: str, folder: Path) -> Any:
    client = RemoteSGLangEngine(
        InferenceEngineConfig(
            **NAMES,
            fileroot=str(folder),
            backend="sglang:d1",
            consumer_batch_size=8,
            max_head_offpolicyness=0,
            setup_timeout=60.0,
            request_timeout=240.0,
            pause_grace_period=0.0,
        )
    )
    client.initialize(addr=address)
    return client


def actor_engine(model: str, mode: str) -> Any:
    actor = FSDPPPOActor(
        PPOActorConfig(
            **NAMES,
            path=model,
            backend="fsdp:d1",
            attn_impl="sdpa",
            dtype="float32",
            grad_reduce_dtype="float32",
            gradient_checkpointing=False,
            optimizer=OptimizerConfig(type="adam", lr=1e-5, weight_decay=0.0),
            weight_update_mode=mode,
            mb_spec=MicroBatchSpec(max_tokens_per_mb=4096),
            ppo_n_minibatches=1,
            eps_clip=0.2,
            kl_ctl=0.0,
            adv_norm=NormConfig(mean_level="batch", std_level="batch"),
        )
    )
    actor.create_process_group()
    actor.initialize(None, FinetuneSpec(1, 8 * STEPS, 8))
    actor.model.register_forward_pre_hook(without_mask, with_kwargs=True)
    return actor


def without_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass no mask where AReaL passes one, None, for each kind of layer, as its transformers want.

    The newer transformers see from the positions where a packed sequence ends.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) and set(mask.values()) == {None}:
        kwargs["attention_mask"] = None
    return args, kwargs


async def generate(client: Any, tokenizer: Any, **changes: Any) -> Any:
    request = ModelRequest(
        rid=str(changes),
        input_ids=tokenizer("Once upon a time")["input_ids"],
        gconfig=HYPERPARAMETERS.new(n_samples=1, **changes),
        tokenizer=tokenizer,
    )
    return await client.agenerate(request)


def check_calls(client: Any, tokenizer: Any, pauses: bool) -> dict[str, Any]:
    """Make the client's single calls, and return what is seen of them."""
    greedy = [asyncio.run(generate(client, tokenizer, greedy=True)) for _ in range(2)]
    sampled = asyncio.run(generate(client, tokenizer, temperature=1.0))
    if pauses:
        client.pause_generation()
        client.continue_generation()
    again = asyncio.run(generate(client, tokenizer, greedy=True))
    return {
        "repeats": greedy[0].output_tokens == greedy[1].output_tokens == again.output_tokens,
        "aligned": len(sampled.output_tokens) == len(sampled.output_logprobs) == 32,
        "stop_reason": sampled.stop_reason,
    }


def updates(mode: str, folder: Path) -> Any:
    if mode == "disk":
        return WeightUpdateMeta.from_disk(
            NAMES["experiment_name"], NAMES["trial_name"], str(folder)
        )
    return WeightUpdateMeta.from_fsdp_xccl(gen_allocation=ModelAllocation.from_str("sglang:d1"))


def train(client: Any, actor: Any, tokenizer: Any, meta: Any) -> list[dict[str, Any]]:
    """Take GRPO steps in the order of AReaL's own trainer; return what each one shows."""
    workflow = RLVRWorkflow(
        reward,
        HYPERPARAMETERS,
        tokenizer,
        get_input_ids_fn=input_ids,
        data_extract_prompt_fn=lambda data: data["topic"],
    )
    shown = []
    for version in range(1, STEPS + 2):
        prompts = [{"topic": f"A story about {topic}:"} for topic in TOPICS]
        batch = actor.rollout_batch(prompts, workflow=workflow, group_size=4)
        logprobs = actor.compute_logp(batch)
        gap, tokens = 0.0, 0
        for answers, computed in zip(batch, logprobs, strict=True):
            mask = torch.roll(answers["loss_mask"], -1, dims=-1).bool()
            rolled = torch.roll(answers["logprobs"], -1, dims=-1)
            gap = max(gap, float((rolled - computed)[mask].abs().max()))
            tokens += int(mask.sum())
            answers["prox_logp"] = computed
        shown.append({"version": version - 1, "gap": gap, "tokens": tokens})
        if version > STEPS:
            return shown
        actor.ppo_update(actor.compute_advantages(batch))
        client.pause()
        actor.update_weights(meta.with_version(version))
        actor.set_version(version)
        client.set_version(version)
        client.resume()
    return shown


def main() -> None:
    address, model, mode = sys.argv[1:4]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29517")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=str(folder / "nfs")))
        tokenizer = AutoTokenizer.from_pretrained(model)
        client = rollout_client(address, folder)
        result: dict[str, Any] = {"calls": check_calls(client, tokenizer, mode != "generate")}
        if mode in ("calls", "generate", "killed"):
            if mode == "killed":
                client.pause_generation()
            print(json.dumps(result), flush=True)
            end(1 if mode == "killed" else 0)
        meta = updates(mode, folder)
        actor = actor_engine(model, mode)
        actor.connect_engine(client, meta)
        result["steps"] = train(client, actor, tokenizer, meta)
        print(json.dumps(result), flush=True)
        client.destroy()
    end(0)


if __name__ == "__main__":
    main()
