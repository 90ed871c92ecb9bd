"""`return_hidden_states` gives the target's last hidden states, a row for each token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.engine.requests.conftest import ALLOWED, NGRAMS
from tests.support.identity import Reference
from tests.support.servers import Server, Servers

SIZE = 576
"""The hidden size of the default model."""
LENGTH = 24
CLOSE = 1e-3
"""Numbers of up to some tens, summed in two orders."""


def flush(server: Server) -> None:
    server.wait_until_idle()
    server.post("/flush_cache")


def rows(states: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the rows of an answer: first those of its prompt, which come together."""
    parts = [part if isinstance(part[0], list) else [part] for part in states]
    return np.concatenate([np.array(part, np.float64) for part in parts])


def same_states(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got["output_ids"] == expected["output_ids"]
    states, others = got["meta_info"]["hidden_states"], expected["meta_info"]["hidden_states"]
    assert len(states) == len(others)
    one, other = rows(states), rows(others)
    assert one.shape == other.shape
    assert one.shape[1] == SIZE
    np.testing.assert_allclose(one, other, atol=CLOSE, rtol=CLOSE)


def generate(server: Server, prompt: Any, **sampling: Any) -> Any:
    options = {"return_hidden_states": True}
    return server.generate(prompt, options=options, **{"max_new_tokens": LENGTH} | sampling)


def test_one_request(speculative: Server, plain: Server, reference: Reference) -> None:
    for prompt in (reference.prompts[0], reference.prompts[6]):
        for server in (speculative, plain):
            flush(server)
        got = generate(speculative, prompt)
        same_states(got, generate(plain, prompt))
        assert len(rows(got["meta_info"]["hidden_states"])) == len(prompt) + LENGTH - 1


def test_a_cached_prefix(speculative: Server, plain: Server, reference: Reference) -> None:
    """The rows of the prompt are those of its tokens that are not cached."""
    prompt, output = reference.prompts[0], reference.outputs[0]
    prompts = (
        prompt,
        prompt,
        [*prompt, *output[:8]],
        [*prompt, *output[:LENGTH], *output[:3]],
        [*prompt[:5], *reference.prompts[6]],
    )
    for server in (speculative, plain):
        flush(server)
    for each in prompts:
        same_states(generate(speculative, each), generate(plain, each))


def test_ends(speculative: Server, plain: Server, reference: Reference) -> None:
    prompt, output = reference.prompts[0], reference.outputs[0]
    for sampling in (
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"stop_token_ids": [output[9]], "ignore_eos": False},
        {"frequency_penalty": 0.5},
    ):
        for server in (speculative, plain):
            flush(server)
        same_states(generate(speculative, prompt, **sampling), generate(plain, prompt, **sampling))


def test_a_batch(speculative: Server, plain: Server, reference: Reference) -> None:
    """One request of it wants no hidden states."""
    body = {
        "input_ids": [reference.prompts[i] for i in (0, 6, 13)],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": LENGTH, "ignore_eos": True},
        "return_hidden_states": [True, False, True],
    }
    answers = []
    for server in (speculative, plain):
        flush(server)
        answers.append(server.post("/generate", body))
    for index, (got, expected) in enumerate(zip(*answers, strict=True)):
        if index == 1:
            assert "hidden_states" not in got["meta_info"]
        else:
            same_states(got, expected)


def test_a_stream(speculative: Server, plain: Server, reference: Reference) -> None:
    """Each chunk has the states of all tokens until then."""
    body = {
        "input_ids": reference.prompts[0],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": LENGTH, "ignore_eos": True},
        "return_hidden_states": True,
        "stream": True,
    }
    last = []
    for server in (speculative, plain):
        flush(server)
        lines = server.request("POST", "/generate", json=body).iter_lines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        for chunk in chunks:
            meta = chunk["meta_info"]
            assert len(meta["hidden_states"]) == meta["completion_tokens"]
        last.append(chunks[-1])
    same_states(*last)


@pytest.mark.server(NGRAMS)
def test_n_grams_of_sglang(servers: Servers, plain: Server, reference: Reference) -> None:
    """Their trees branch, so that accepted tokens do not stand side by side."""
    server = servers.get(NGRAMS, *ALLOWED)
    for index in (0, 13, 14, 13):
        for each in (server, plain):
            flush(each)
        prompt = reference.prompts[index]
        same_states(generate(server, prompt), generate(plain, prompt))
