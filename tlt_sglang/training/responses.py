"""The responses that `tlt train` learns from: those of the data, and the target's own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from tlt_sglang.errors import ConfigError
from tlt_sglang.training import corpus, generate
from tlt_sglang.training.corpus import Response
from tlt_sglang.training.progress import Bar, say

if TYPE_CHECKING:
    from tlt_sglang.training.offline import TrainOptions
    from tlt_sglang.training.target import Target


def collect(options: TrainOptions, target: Target, path: Path) -> list[Response]:
    """Return the responses of the data, and the target's own to prompts that have none.

    The first process generates the latter and appends them to `path`, where the others read them.
    Raises ConfigError if none of them has tokens to learn from.
    """
    requests: list[generate.AnswerRequest] = []
    responses: list[Response] = []
    for number, item in enumerate(corpus.read_data(options.data, target.encode, target.chat)):
        if isinstance(item, Response):
            responses.append(item)
            continue
        temperature = options.temperatures[number % len(options.temperatures)]
        requests.append(generate.AnswerRequest(item, temperature, options.max_new_tokens))

    if requests and rank() == 0:
        _generate(options, requests, path, target.path)
    if dist.is_initialized():
        dist.barrier()
    generated = {(r.prompt.key, r.temperature): r for r in corpus.read_responses(path)}
    responses += [generated[_key(request)] for request in requests]

    # A response of one token has nothing to predict.
    responses = [response for response in responses if len(response.output) > 1]
    if not responses:
        raise ConfigError(
            f"The data {options.data} has no response tokens to learn from; add prompts, or "
            "raise --max-new-tokens."
        )
    return responses


def _generate(
    options: TrainOptions, requests: Sequence[generate.AnswerRequest], path: Path, model: str
) -> None:
    """Append the responses that `path` does not have yet, from a server of the target."""
    existing = {(r.prompt.key, r.temperature) for r in corpus.read_responses(path)}
    unique = {_key(request): request for request in requests}
    missing = [request for key, request in unique.items() if key not in existing]
    if not missing:
        return
    # Greedy requests in a batch of sampled ones make SGLang sort every row's vocabulary.
    missing.sort(key=lambda request: request.temperature)
    with (
        generate.serve(model, options.at_once, say) as server,
        Bar("responses", len(missing)) as bar,
    ):

        def counted() -> Iterator[Response]:
            tokens, start = 0, time.monotonic()
            for response in server.answers(missing):
                tokens += len(response.output)
                bar.advance(1, f"{tokens / (time.monotonic() - start):.0f} tokens/s")
                yield response

        corpus.append_responses(path, counted())


def _key(request: generate.AnswerRequest) -> tuple[str, float]:
    return request.prompt.key, request.temperature


def split(responses: list[Response]) -> tuple[list[Response], list[Response]]:
    """Return (to train on, held out), split by prompt so that no prompt is in both.

    Raises ConfigError for a single prompt.
    """
    held_out = [response for response in responses if response.prompt.held_out]
    trained = [response for response in responses if not response.prompt.held_out]
    if not held_out or not trained:
        keys = sorted({response.prompt.key for response in responses})
        if len(keys) < 2:
            raise ConfigError(
                "The data has one prompt, and one has to be held out; add at least another."
            )
        chosen = set(keys[: max(1, len(keys) // corpus.HELD_OUT)])
        held_out = [response for response in responses if response.prompt.key in chosen]
        trained = [response for response in responses if response.prompt.key not in chosen]
    return trained, held_out


def kind(response: Response) -> str:
    """Return the kind of a response: where its prompt comes from, and its temperature."""
    return f"{response.prompt.kind} t={response.temperature:g}"


def counts(responses: list[Response]) -> dict[str, dict[str, int]]:
    """Return the number of responses and of response tokens of every kind."""
    by_kind: dict[str, dict[str, int]] = {}
    for response in responses:
        count = by_kind.setdefault(kind(response), {"responses": 0, "tokens": 0})
        count["responses"] += 1
        count["tokens"] += len(response.output)
    return by_kind


def rank() -> int:
    """Return the rank of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0
