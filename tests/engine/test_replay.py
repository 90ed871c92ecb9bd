"""Replay: a logged answer can be asked for again, whole or from where it broke off.

A pool under the random policy, so that nothing but weights, prompt and seed can be the reason why
two answers agree. The server is killed in the middle of an answer and started again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_coupled import COUPLED
from tests.engine.test_features import EOS, TIGHT
from tests.engine.test_sampling import FLAGS, PROMPT
from tests.support.fitting import Tiny
from tests.support.identity import POOL
from tests.support.long import first_and_long
from tests.support.prompts import prompts
from tests.support.servers import Server, Servers
from tlt_sglang import cli
from tlt_sglang.launcher.child_process import wait_for

TOKENS = 64
BROKEN_OFF = 20
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "cold, min-p": {"temperature": 0.7, "min_p": 0.05},
}


class Logged:
    """A server with a log of requests, which can be killed and started again."""

    def __init__(self, servers: Servers, drafter: str, log: Path) -> None:
        self.log = log
        flags = (*COUPLED, "--tlt-policy", "random", "--tlt-events", str(log))
        self._flags = (*flags, "--tlt-log-requests")
        self._servers, self._drafter = servers, drafter

    @property
    def server(self) -> Server:
        """The server that runs; another one after it has been killed."""
        pool = POOL.replace("eagle:", "eagle3:")
        return self._servers.get(pool, *self._flags, drafter=self._drafter)

    def kill(self) -> None:
        """End all processes of the server by SIGKILL."""
        server = self.server
        del self._servers.running[server.spec]
        server.kill()

    def requests(self) -> list[dict[str, Any]]:
        """Return the lines of requests in the log."""
        events = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [event for event in events if event["event"] == "request"]

    def replay(self) -> int:
        """Run `tlt replay` against the server and return its exit status."""
        return cli.main(["replay", str(self.log), "--url", self.server.url])


@pytest.fixture(scope="module")
def logged(
    servers: Servers, drafters: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Logged:
    return Logged(servers, drafters["eagle3"], tmp_path_factory.mktemp("replay") / "events")


def ask(server: Server, prompt: Sequence[int], length: int, **sampling: Any) -> dict[str, Any]:
    return server.generate(prompt, length, **({"temperature": 1.0} | sampling))


def parts(server: Server, prompt: Sequence[int], length: int) -> Iterator[dict[str, Any]]:
    """Yield the parts of a streamed answer at temperature 1, as they come."""
    parameters = {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": parameters, "stream": True}
    with server.request("POST", "/generate", json=body, stream=True) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def seed_of(answer: dict[str, Any]) -> int:
    seed = answer["meta_info"]["sampling_seed"]
    assert isinstance(seed, int)
    return seed


def test_every_answer_names_its_seed(logged: Logged) -> None:
    server, prompt = logged.server, prompts()[0]
    pair: Any = ask(server, prompt, 8, n=2)
    answers = [ask(server, prompt, 8), ask(server, prompt, 8), *pair]
    assert len({seed_of(answer) for answer in answers}) == 4
    for answer in answers:
        again = ask(server, prompt, 8, sampling_seed=seed_of(answer))
        assert (again["output_ids"], seed_of(again)) == (answer["output_ids"], seed_of(answer))
    streamed = list(parts(server, prompt, 8))
    assert len({seed_of(part) for part in streamed}) == 1
    again = ask(server, prompt, 8, sampling_seed=seed_of(streamed[0]))
    assert again["output_ids"] == streamed[-1]["output_ids"]


@pytest.mark.parametrize("way", first_and_long(WAYS))
def test_an_answer_goes_on_from_its_first_tokens(logged: Logged, way: str) -> None:
    server = logged.server
    for prompt in prompts()[:4]:
        whole = ask(server, prompt, TOKENS, **WAYS[way])
        sampling = WAYS[way] | {"sampling_seed": seed_of(whole)}
        server.post("/flush_cache")  # the rest must not rest on what the whole answer has cached
        first = ask(server, prompt, BROKEN_OFF, **sampling)["output_ids"]
        server.post("/flush_cache")
        rest = ask(server, [*prompt, *first], TOKENS - BROKEN_OFF, **sampling)["output_ids"]
        assert [*first, *rest] == whole["output_ids"]


def test_an_aborted_answer_goes_on(logged: Logged) -> None:
    server, prompt = logged.server, prompts()[1]
    broken_off: dict[str, Any] = {}
    for broken_off in parts(server, prompt, TOKENS):
        if len(broken_off["output_ids"]) >= BROKEN_OFF:
            server.post("/abort_request", {"rid": broken_off["meta_info"]["id"]})
    first, seed = broken_off["output_ids"], seed_of(broken_off)
    assert broken_off["meta_info"]["finish_reason"]["type"] == "abort" and len(first) < TOKENS
    rest = ask(server, [*prompt, *first], TOKENS - len(first), sampling_seed=seed)
    whole = ask(server, prompt, TOKENS, sampling_seed=seed)
    assert [*first, *rest["output_ids"]] == whole["output_ids"]


def test_retracted_answers_go_on(
    logged: Logged, servers: Servers, drafters: dict[str, str]
) -> None:
    """A pool of 560 KV slots retracts some of 24 requests, and they give what they give alone."""
    # With ignore_eos SGLang reckons with the whole output beforehand, and retracts nothing.
    shape = {"temperature": 1.0, "max_new_tokens": TOKENS, "logit_bias": {str(EOS): -100.0}}
    body = {
        "input_ids": [prompt for prompt in prompts() if len(prompt) < 100][:4] * 6,
        "sampling_params": [shape | {"sampling_seed": seed} for seed in range(24)],
    }
    pool = POOL.replace("eagle:", "eagle3:")
    flags = (*COUPLED, *TIGHT, "--tlt-policy", "random")
    tight = servers.get(pool, *flags, drafter=drafters["eagle3"])
    answers = tight.post("/generate", body)  # in one request, so that they begin together
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    expected = logged.server.post("/generate", body)
    assert [one["output_ids"] for one in answers] == [one["output_ids"] for one in expected]


def test_after_a_kill_answers_go_on_and_the_log_replays(
    logged: Logged, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, others = prompts()[2], prompts()[3:9]
    for number, other in enumerate(others):
        ask(logged.server, other, 32, **list(WAYS.values())[number % len(WAYS)])
    count = len(logged.requests())
    broken_off: dict[str, Any] = {}
    for broken_off in parts(logged.server, prompt, 4 * TOKENS):
        if len(broken_off["output_ids"]) >= BROKEN_OFF:
            break
    logged.kill()
    first, seed = broken_off["output_ids"], seed_of(broken_off)
    assert len(logged.requests()) == count >= len(others)  # the one that broke off is not answered

    # Another server goes on with the same tokens, and repeats all that the log holds.
    assert logged.replay() == 0
    report = capsys.readouterr().out
    assert f"{count} answers: {count} the same, 0 different." in report
    rest = ask(logged.server, [*prompt, *first], TOKENS - len(first), sampling_seed=seed)
    whole = ask(logged.server, prompt, TOKENS, sampling_seed=seed)
    assert [*first, *rest["output_ids"]] == whole["output_ids"]


def test_a_changed_log_does_not_replay(
    logged: Logged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(logged.server, prompts()[0], 8)
    assert wait_for(lambda: bool(logged.requests()), 10)
    line = logged.requests()[-1]
    line["output_ids"][5] += 1
    changed = tmp_path / "events"
    changed.write_text(json.dumps(line) + "\n")
    assert cli.main(["replay", str(changed), "--url", logged.server.url]) == 1
    assert f"{line['id']}: differs at position 5 of 8" in capsys.readouterr().out


def test_of_several_tokenizer_workers_each_gives_seeds_and_logs(
    servers: Servers, tiny: Tiny, tmp_path: Path
) -> None:
    log = tmp_path / "events"
    logs = ("--tlt-events", str(log), "--tlt-log-requests")
    server = servers.get(
        "off", *FLAGS, *COUPLED, *logs, "--tokenizer-worker-num", "2", model=tiny.path
    )
    seeds: list[int] = []

    def both_have_answered() -> bool:
        with ThreadPoolExecutor(8) as threads:  # whoever accepts a connection first answers it
            answers = list(threads.map(lambda _: ask(server, PROMPT, 8), range(24)))
        seeds.extend(seed_of(answer) for answer in answers)
        assert wait_for(lambda: len(log.read_text().splitlines()) == len(seeds), 10)
        return len({json.loads(line)["pid"] for line in log.read_text().splitlines()}) == 2

    assert wait_for(both_have_answered, 60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["sampling_params"]["sampling_seed"] for line in lines) == sorted(seeds)
    assert len(set(seeds)) == len(seeds)
    assert cli.main(["replay", str(log), "--url", server.url]) == 0
    servers.drop(server)
