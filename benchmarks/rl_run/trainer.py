"""The trainer of one system: GRPO with AReaL's FSDPPPOActor, a step at a time, the same every time.

    python -m benchmarks.rl_run.trainer FOLDER ADDRESS... [--coordinator ENDPOINT]

Runs in the environment of `make stacks`. It has the settings from FOLDER, generates on the servers
at ADDRESS, and writes what it does into FOLDER. Started again, it goes on after the last
checkpoint. A coordinator hears of rollouts, and that the policy is being trained.

The weights depend on tokens alone: responses are ordered by their place, not by their arrival; the
old logprobs are the trainer's own, not the server's; the number of threads is fixed, and nothing is
compiled for certain shapes. Neither responses that were cut off nor groups without different
rewards are trained on (DAPO, arXiv 2503.14476); of every other group it is the half whose rewards
vary most (PODS, arXiv 2504.13818).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from areal.api import FinetuneSpec, ModelAllocation, SaveLoadMeta, WeightUpdateMeta
from areal.api.cli_args import (
    MicroBatchSpec,
    NameResolveConfig,
    NormConfig,
    OptimizerConfig,
    PPOActorConfig,
)
from areal.engine.fsdp_engine import FSDPPPOActor
from areal.trainer.ppo import actor as areal_actor
from areal.utils import name_resolve
from transformers import AttentionInterface, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.rl_run import problems, rollouts, settings
from benchmarks.rl_run.rollouts import NAMES, Answers
from benchmarks.rl_run.settings import Settings, Step
from tlt_sglang.coordinator.client import Client
from tlt_sglang.coordinator.messages import Freed, SignalKind

TAIL = 8
"""A rollout is in its tail when at most one in TAIL of its responses is unfinished."""
MICRO_BATCH_TOKENS = 1024
"""Tokens of a micro-batch; a longer response is one by itself."""
CLAIM_SECONDS = 1.0
"""Longest wait for the sidecar to leave."""
CHECKED = 2
"""Responses of a step whose logprobs are compared with the server's, both in float32."""


def actor_engine(run: Settings) -> Any:
    """Return AReaL's trainer with the policy that the run begins with."""
    group = NormConfig(mean_level="group", std_level="group", group_size=run.trained)
    areal_actor.grpo_loss_fn = _on_policy(areal_actor.grpo_loss_fn)
    AttentionInterface.register("sdpa", _packed_attention)
    actor = FSDPPPOActor(
        PPOActorConfig(
            **NAMES,
            path=run.policy,
            backend="fsdp:d1",
            attn_impl="sdpa",
            dtype="float32",
            grad_reduce_dtype="float32",
            gradient_checkpointing=False,
            optimizer=OptimizerConfig(
                type="adam",
                lr=run.learning_rate,
                weight_decay=0.0,
                lr_scheduler_type="constant",
                warmup_steps_proportion=0.0,
            ),
            weight_update_mode=run.update,
            mb_spec=MicroBatchSpec(max_tokens_per_mb=MICRO_BATCH_TOKENS),
            ppo_n_minibatches=1,
            eps_clip=0.2,
            kl_ctl=0.0,
            reward_norm=group,
            adv_norm=None,
            recompute_logprob=False,
            use_decoupled_loss=False,
        )
    )
    actor.create_process_group()
    responses = run.problems * run.group
    actor.initialize(None, FinetuneSpec(1, responses * run.steps, responses))
    actor.model.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return actor


def _on_policy(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return AReaL's loss, with the logprobs of the training's own forward pass as the old ones.

    One update follows each rollout, so both are those of the same policy: the ratio is 1, and a
    forward pass for the old ones, which TRL leaves out for the same reason, would be two fifths of
    the training. The server's would do as well, but their last bits depend on the batch.
    """

    def with_own_logprobs(logprobs: torch.Tensor, entropy: Any, data: Any, **more: Any) -> Any:
        own = logprobs.detach()
        return loss(logprobs, entropy, dict(data) | {"logprobs": own, "prox_logp": own}, **more)

    return with_own_logprobs


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of packed sequences, each by itself.

    Query, key and value have shape [1, heads, tokens, head size], the result [1, tokens, heads,
    head size]. What comes with transformers computes a packed batch as one long
    sequence and masks what is between sequences, a quarter of a training's time here.
    """
    lengths = cu_seqlens.diff().tolist()
    tensors = (query, key, value)
    parts = zip(*(torch.split(tensor, lengths, dim=2) for tensor in tensors), strict=True)
    return torch.cat(
        [sdpa_attention_forward(module, *part, None, scaling=scaling)[0] for part in parts], dim=1
    ), None


def _difference(after: list[int], before: list[int]) -> list[int]:
    return [one - other for one, other in zip(after, before, strict=True)]


def _length(one: dict[str, Any]) -> int:
    """Return the number of tokens of a response."""
    return int(one["loss_mask"].sum())


def _without_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass no mask where AReaL passes one, None, for each kind of layer, as its transformers want.

    The newer transformers see from the positions where a packed sequence ends.
    """
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) and set(mask.values()) == {None}:
        kwargs["attention_mask"] = None
    return args, kwargs


class Run:
    """A run in its folder: the client, the trainer, and the steps so far."""

    def __init__(self, folder: Path, addresses: list[str], coordinator: str | None) -> None:
        self.folder, self.settings = folder, Settings.read(folder)
        self.addresses = addresses
        self.tokenizer = AutoTokenizer.from_pretrained(self.settings.policy)
        responses = self.settings.problems * self.settings.group
        self.client = rollouts.client(addresses, folder, responses)
        self.workflow = rollouts.workflow(self.settings, self.tokenizer)
        if self.settings.update == "disk":
            self.meta = WeightUpdateMeta.from_disk(*NAMES.values(), str(folder))
        else:
            self.meta = WeightUpdateMeta.from_fsdp_xccl(
                gen_allocation=ModelAllocation.from_str(f"sglang:d{len(addresses)}")
            )
        self.stack = None if coordinator is None else Client(coordinator, "trainer", "stack")
        self.actor = actor_engine(self.settings)
        self.actor.connect_engine(self.client, self.meta)
        self.steps: list[Step] = []
        self._resume()

    def finish(self) -> None:
        """Take the steps that are left, and write the result."""
        for number in range(len(self.steps), self.settings.steps):
            self.steps.append(self.step(number))
            settings.write_steps(self.folder, self.steps)
            done = number + 1
            if done % self.settings.checkpoint_every == 0 or done == self.settings.steps:
                self._checkpoint(done)
        result = {"weights": self.digest(), "steps": len(self.steps)}
        (self.folder / settings.RESULT).write_text(json.dumps(result))

    def step(self, number: int) -> Step:
        """Generate, train, and hand the weights over."""
        self.client.backend.answers = answers = Answers()
        bodies = rollouts.bodies_of(self.settings, number, self.tokenizer)
        before = rollouts.strategy_counts(self.addresses)
        self._tell("release_device", "rollout_begins")
        began = time.perf_counter()
        batch = self.actor.rollout_batch(bodies, workflow=self.workflow)
        rolled = time.perf_counter()
        self._claim()
        batch.sort(key=lambda one: int(one["index"]))
        assert [int(one.pop("index")) for one in batch] == list(range(len(bodies)))
        trained, gap = self._train(batch)
        updated = time.perf_counter()
        self._hand_over(number + 1)
        ended = time.perf_counter()
        after = rollouts.strategy_counts(self.addresses)
        responses = [one["input_ids"][0][one["loss_mask"][0].bool()].tolist() for one in batch]
        lengths = sorted(len(one) for one in responses)
        in_tail = answers.ended[-1 - len(bodies) // TAIL]
        return Step(
            step=number,
            rollout=hashlib.sha256(json.dumps(responses).encode()).hexdigest(),
            rollout_seconds=rolled - began,
            train_seconds=updated - rolled,
            update_seconds=ended - updated,
            reward=statistics.mean(float(one["rewards"]) for one in batch),
            accept_length=answers.tokens / answers.verify_steps,
            strategies={name: _difference(after[name], before[name]) for name in after},
            tokens=sum(lengths),
            trained_tokens=trained,
            longest=lengths[-1],
            median=statistics.median(lengths),
            tail_seconds=answers.ended[-1] - in_tail,
            gap=gap,
            drafter_version=answers.drafter_version,
        )

    def _tell(self, *signals: SignalKind) -> None:
        for signal in signals:
            if self.stack is not None:
                self.stack.tell(signal)

    def _claim(self) -> None:
        """Claim the cores for training, and wait until the sidecar has left them."""
        self._tell("rollout_ends", "claim_device")
        until = time.monotonic() + CLAIM_SECONDS
        while self.stack is not None and time.monotonic() < until:
            if any(isinstance(one, Freed) for one in self.stack.poll()):
                return
            time.sleep(0.01)

    def _train(self, batch: list[dict[str, Any]]) -> tuple[int, float]:
        """Take one step of GRPO; return (tokens trained on, largest difference of logprobs)."""
        size = self.settings.group
        groups = [batch[start : start + size] for start in range(0, len(batch), size)]
        kept = [dict(one) for group in groups for one in self._trained(group)]
        if not kept:
            return 0, 0.0
        longest = max(one["input_ids"].shape[1] for one in kept)
        self.actor.config.mb_spec.max_tokens_per_mb = max(MICRO_BATCH_TOKENS, longest)
        middle = len(kept) // 2
        by_length = sorted(kept, key=_length)
        gap = self._gap([dict(one) for one in by_length[middle : middle + CHECKED]])
        for one in kept:
            one["logprobs"] = torch.zeros_like(one["logprobs"])  # see _on_policy
        # Weights, gradients and optimizer are in float32, the products in bfloat16. Weights that
        # autocast keeps for the next micro-batch would take its gradients to the graph of the first
        # one, where FSDP misses them: they would come up in the next step.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            self.actor.ppo_update(self.actor.compute_advantages(kept))
        return sum(map(_length, kept)), gap

    def _trained(self, group: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the responses of a group to train on, none if they would have no advantage."""
        complete = [one for one in group if _length(one) < self.settings.longest]
        rewards = [float(one["rewards"]) for one in complete]
        chosen = problems.most_varied(rewards, self.settings.trained)
        return [complete[place] for place in chosen]

    def _gap(self, some: list[dict[str, Any]]) -> float:
        """Return the largest difference of the server's logprobs from the trainer's."""
        gaps = []
        for one, logprobs in zip(some, self.actor.compute_logp(some), strict=True):
            mask = torch.roll(one["loss_mask"], -1, dims=-1).bool()
            rolled = torch.roll(one["logprobs"], -1, dims=-1)
            gaps.append(float((rolled - logprobs)[mask].abs().max()))
        return max(gaps)

    def _hand_over(self, version: int) -> None:
        """Update the servers' weights, in the order of AReaL's own trainer."""
        self.client.pause()
        self.actor.update_weights(self.meta.with_version(version))
        self.actor.set_version(version)
        self.client.set_version(version)
        self.client.resume()
        for old in self.folder.glob(f"**/weight_update_v{version - 1}"):
            shutil.rmtree(old)

    def digest(self) -> str:
        """Return the SHA-256 of the policy's weights, in the order of their names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.actor.model.state_dict().items()):
            tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _checkpoint(self, steps: int) -> None:
        """Store weights and optimizer after so many steps, and drop the checkpoint before."""
        root = self.folder / settings.CHECKPOINTS
        temporary, final = root / "unfinished", root / str(steps)
        shutil.rmtree(temporary, ignore_errors=True)
        self.actor.save(self._meta(temporary))
        temporary.replace(final)
        for old in root.iterdir():
            if old != final:
                shutil.rmtree(old)

    def _resume(self) -> None:
        """Go back to the newest checkpoint, and give the servers its weights."""
        root = self.folder / settings.CHECKPOINTS
        done = [int(one.name) for one in root.glob("*") if one.name.isdigit()]
        if not done:
            return
        newest = max(done)
        self.actor.load(self._meta(root / str(newest)))
        self.steps = settings.read_steps(self.folder)[:newest]
        self._hand_over(newest)

    def _meta(self, folder: Path) -> Any:
        return SaveLoadMeta(
            str(folder), weight_format="hf", with_optim=True, tokenizer=self.tokenizer
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.rl_run.trainer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("addresses", nargs="+")
    parser.add_argument("--coordinator", metavar="ENDPOINT")
    return parser


def main() -> None:
    """Run to the end; the processes that AReaL and torch leave are ended with this one."""
    args = _parser().parse_args()
    folder = args.folder
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    run = Settings.read(folder)
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    torch.use_deterministic_algorithms(True)
    # A search for faults, and slow.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    # The names of a run that was interrupted would be in the way of the one that goes on.
    names = folder / "names"
    shutil.rmtree(names, ignore_errors=True)
    name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=str(names)))
    Run(folder, args.addresses, args.coordinator).finish()
    for child in psutil.Process().children(recursive=True):
        child.kill()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
