"""AReaL's client and workflow with a seed for every response; runs in the trainer's process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch
from areal.api import AsyncRewardWrapper, ModelRequest
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig
from areal.engine.sglang_remote import RemoteSGLangEngine, SGLangBackend
from areal.infra import RemoteInfEngine
from areal.workflow.rlvr import RLVRWorkflow

from benchmarks.rl_run import problems
from benchmarks.rl_run.settings import Settings

NAMES = {"experiment_name": "rl_run", "trial_name": "one"}
SEED = "sampling_seed"
REQUEST_SECONDS = 1800.0
STATUS_SECONDS = 60.0


@dataclass
class Answers:
    """Counts over the server's answers in one rollout."""

    ended: list[float] = field(default_factory=list)
    """Moments at which responses were complete."""
    tokens: int = 0
    verify_steps: int = 0
    drafter_version: int = 0

    def add(self, meta: dict[str, Any]) -> None:
        """Count one answer."""
        self.ended.append(time.perf_counter())
        self.tokens += meta["completion_tokens"]
        # Without speculation each token takes a step.
        self.verify_steps += meta.get("spec_verify_ct") or meta["completion_tokens"]
        versions = [int(version) for version in meta.get("drafter_version") or []]
        self.drafter_version = max([self.drafter_version, *versions])


def strategy_counts(addresses: list[str]) -> dict[str, list[int]]:
    """Return verify steps and accepted drafts of sampled requests so far, by strategy."""
    counts: dict[str, list[int]] = {}
    for address in addresses:
        answer = requests.get(f"http://{address}/tlt/status", timeout=STATUS_SECONDS)
        answer.raise_for_status()
        (scheduler,) = answer.json()["schedulers"]
        # A server without drafts counts none.
        for name, tally in (scheduler.get("strategies") or {}).items():
            both = counts.setdefault(name, [0, 0])
            both[0] += tally["sampled_verify_steps"]
            both[1] += tally["sampled_accepted"]
    return counts


class SeededBackend(SGLangBackend):
    """AReaL's calls of SGLang, with the seed of each request; counts the answers."""

    def __init__(self) -> None:
        self.answers = Answers()

    def build_generation_request(self, req: Any, with_lora: bool, version: int) -> Any:
        """Return AReaL's request with the seed."""
        request = super().build_generation_request(req, with_lora, version)
        request.payload["sampling_params"][SEED] = req.metadata[SEED]
        return request

    def parse_generation_response(self, response: dict[str, Any]) -> Any:
        """Count the answer, and return what AReaL reads in it."""
        self.answers.add(response["meta_info"])
        return super().parse_generation_response(response)


class SeededEngine(RemoteSGLangEngine):
    """AReaL's client of a running server."""

    def __init__(self, config: InferenceEngineConfig) -> None:
        self.config = config
        self.backend = SeededBackend()
        self._engine = RemoteInfEngine(config, self.backend)


class SeededWorkflow(RLVRWorkflow):
    """AReaL's workflow of single answers, with a seed and a place for each."""

    def __init__(self, sampling: GenerationHyperparameters, tokenizer: Any) -> None:
        super().__init__(score, sampling, tokenizer)
        # A reward that took too long would be 0, and depend on how busy the machine is.
        self.async_reward_fn = AsyncRewardWrapper(score, timeout_seconds=REQUEST_SECONDS)

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return one response as a trajectory, with its place in the batch as `index`."""
        request = ModelRequest(
            rid=str(data["index"]),
            input_ids=list(data["input_ids"]),
            gconfig=self.gconfig.new(n_samples=1),
            tokenizer=self.tokenizer,
            metadata={SEED: data[SEED]},
        )
        response, reward = await self._collect_samples(engine, request, "", data)
        prompt, answer = response.input_len, response.output_len
        trajectory = {
            "input_ids": torch.tensor(response.input_tokens + response.output_tokens),
            "loss_mask": torch.tensor([0] * prompt + [1] * answer, dtype=torch.int32),
            "logprobs": torch.tensor([0.0] * prompt + response.output_logprobs),
            "versions": torch.tensor([-1] * prompt + response.output_versions),
            "attention_mask": torch.ones(prompt + answer, dtype=torch.bool),
            "rewards": torch.tensor(float(reward)),
            "index": torch.tensor(data["index"]),
        }
        return {name: value.unsqueeze(0) for name, value in trajectory.items()}


def score(
    prompt: str, completion: str, prompt_ids: list[int], completion_ids: list[int], **data: Any
) -> float:
    """Return the reward of one response, as AReaL asks for it."""
    return problems.reward(data["answer"], completion.removesuffix("<|im_end|>"))


def client(addresses: list[str], folder: Path, responses: int) -> SeededEngine:
    """Return AReaL's client, connected to the servers."""
    engine = SeededEngine(
        InferenceEngineConfig(
            **NAMES,
            fileroot=str(folder),
            # AReaL takes its parallelism for the trainer's, and would send a part of the responses.
            backend="sglang:d1",
            consumer_batch_size=responses,
            max_concurrent_rollouts=responses,
            max_head_offpolicyness=0,
            setup_timeout=120.0,
            request_timeout=REQUEST_SECONDS,
            request_retries=1,
            pause_grace_period=0.0,
        )
    )
    engine.initialize(addr=addresses)
    return engine


def workflow(settings: Settings, tokenizer: Any) -> SeededWorkflow:
    """Return the workflow of a run."""
    sampling = GenerationHyperparameters(
        max_new_tokens=settings.longest, temperature=1.0, n_samples=1
    )
    return SeededWorkflow(sampling, tokenizer)


def bodies_of(settings: Settings, step: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the requests of one step, in the order of problems and samples."""
    bodies: list[dict[str, Any]] = []
    problems_of_step = problems.of_step(settings.seed, step, settings.problems)
    for number, problem in enumerate(problems_of_step):
        ids = tokenizer.encode(problems.prompt(problem.question), add_special_tokens=False)
        for sample in range(settings.group):
            bodies.append(
                {
                    "index": len(bodies),
                    "input_ids": ids,
                    "answer": problem.answer,
                    SEED: settings.sample_seed(step, number, sample),
                }
            )
    return bodies
