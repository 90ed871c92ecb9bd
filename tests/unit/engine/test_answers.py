"""Seeds and answers in the main process, and the log from which requests can be sent again."""

from __future__ import annotations

import asyncio
import json
import logging
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.engine import admit
from tlt_sglang.engine.answers import SEED, Answers
from tlt_sglang.engine.request_log import RequestLog
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.sampling.seeds import SEED_BITS, next_seed

pytestmark = pytest.mark.sglang


def request(**fields: Any) -> Any:
    from sglang.srt.managers.io_struct import GenerateReqInput

    made = GenerateReqInput(**({"input_ids": [3, 4]} | fields))
    made.normalize_batch_and_arguments()
    return made


def manager(**preferred: Any) -> Any:
    args = SimpleNamespace(random_seed=5, tokenizer_worker_num=1)
    return SimpleNamespace(
        server_args=args, preferred_sampling_params=preferred or None, rid_to_state={}
    )


@pytest.fixture
def tokenize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the checks of `admit` out, which need a model."""
    monkeypatch.setattr(admit, "tokenized", lambda original, *arguments: original(*arguments))


def tokenized(answers: Answers, at: Any, one: Any) -> int | None:
    """Return the seed with which a request is sent to the scheduler."""
    answers.tokenized(lambda *_: None, at, one, None, None)
    seed: int | None = one.sampling_params.get(SEED)
    return seed


@pytest.mark.usefixtures("tokenize")
def test_a_request_without_a_seed_gets_one() -> None:
    coupled, other = Answers(True, None), Answers(False, None)
    seeds = [tokenized(coupled, manager(), request()) for _ in range(64)]
    assert len({*seeds}) == 64 and all(seed and 0 <= seed < 2**SEED_BITS for seed in seeds)
    assert [tokenized(Answers(True, None), manager(), request())] == seeds[:1]
    assert tokenized(coupled, manager(), request(sampling_params={SEED: 0})) == 0
    assert tokenized(coupled, manager(sampling_seed=8), request()) is None
    assert tokenized(other, manager(), request()) is None


@pytest.mark.usefixtures("tokenize")
def test_requests_that_share_their_parameters_get_a_seed_each() -> None:
    answers, shared = Answers(True, None), {"temperature": 1.0}
    calls = [request(sampling_params=shared) for _ in range(8)]
    assert len({tokenized(answers, manager(), one) for one in calls}) == 8
    assert shared == {"temperature": 1.0}


@pytest.mark.parametrize("limit", [8, None])
def test_each_sample_is_named_the_seed_that_it_was_sent_with(limit: int | None) -> None:
    """Also without a limit, as chat completions send it: else all samples would be the same."""
    answers, at, seeds = Answers(True, None), manager(), []
    parameters = SimpleNamespace(n=3, max_new_tokens=0, sampling_seed=7)
    answers.sent(at, SimpleNamespace(rid="prefix", sampling_params=parameters))
    parameters.max_new_tokens = limit
    for name in "abc":
        at.rid_to_state[name] = SimpleNamespace(obj=request(sampling_params={SEED: 7}))
        answers.sent(at, SimpleNamespace(rid=name, sampling_params=parameters))
        seeds.append(at.rid_to_state[name].obj.sampling_params[SEED])
    assert seeds == [7, next_seed(7), next_seed(next_seed(7))]


def collect(answers: Answers, one: Any, parts: list[list[int]], reason: Any) -> list[Any]:
    """Return the answers that a client gets, where SGLang yields `parts` of one."""
    state: Any = SimpleNamespace(obj=one, output_ids=[])

    async def yielded() -> AsyncIterator[Any]:
        for part in parts:
            state.output_ids += part
            end = reason if part is parts[-1] else None
            yield {"meta_info": {"id": "a", "finish_reason": end, "weight_version": "v1"}}

    async def run() -> list[Any]:
        return [each async for each in answers.stream(yielded(), manager(), one, state)]  # type: ignore[arg-type]

    return asyncio.run(run())


def test_every_part_of_an_answer_has_the_seed() -> None:
    one = request(sampling_params={SEED: 9})
    got = collect(Answers(True, None), one, [[1], [2]], {"type": "stop"})
    assert [part["meta_info"][SEED] for part in got] == [9, 9]
    got = collect(Answers(False, None), one, [[1]], {"type": "stop"})
    assert SEED not in got[0]["meta_info"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_answered_request_is_logged_whole(tmp_path: Path) -> None:
    path = tmp_path / "events"
    answers = Answers(True, str(path))
    one = request(sampling_params={SEED: 9, "n": 2, "top_p": 0.5}, lora_path="a")[0]
    collect(answers, one, [[1], [2, 3]], {"type": "length", "length": 3})
    assert answers._log is not None
    answers._log.close()
    (line,) = lines(path)
    assert {"event": "request", "id": "a", "input_ids": [3, 4]}.items() <= line.items()
    assert line["sampling_params"] == {SEED: 9, "top_p": 0.5} and line["lora_path"] == "a"
    assert (line["output_ids"], line["weight_versions"]) == ([1, 2, 3], ["v1"])
    assert line["finish_reason"] == {"type": "length", "length": 3}


def test_requests_that_cannot_be_sent_again_are_not_logged(tmp_path: Path) -> None:
    path = tmp_path / "events"
    answers = Answers(True, str(path))
    cases: list[tuple[Any, list[list[int]]]] = [
        (request(log_metrics=False), [[1]]),
        (request(), [[]]),
        (request(session_params={"id": "s"}), [[1]]),
        (request(input_ids=None, input_embeds=[[0.0]]), [[1]]),
        (request(image_data=["a.png"]), [[1]]),
    ]
    for one, parts in cases:
        collect(answers, one, parts, {"type": "stop"})
    assert answers._log is not None
    answers._log.close()
    assert path.read_text() == ""


def test_the_prompt_of_a_text_is_its_token_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sent = TokenizedGenerateReqInput(
        input_text="a b",
        input_ids=array("q", [5, 6]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=SamplingParams(),
        return_logprob=False,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )
    monkeypatch.setattr(admit, "tokenized", lambda *_: sent)
    one = request(input_ids=None, text="a b")
    Answers(True, str(tmp_path / "events")).tokenized(lambda: None, manager(), one)
    assert one.input_ids == [5, 6]


def test_the_log_goes_on_after_a_line_that_json_does_not_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "events"
    log = RequestLog(str(path))
    info = {"id": "a", "finish_reason": {"type": "stop"}}
    with caplog.at_level(logging.WARNING):
        log.add(request(), {"custom_params": {1, 2}}, [1], info)
        log.add(request(), {}, [2], info)
        log.close()
    assert [line["output_ids"] for line in lines(path)] == [[2]]
    assert "Requests are missing in the event log" in caplog.text


def test_a_log_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="give --tlt-events another file"):
        Answers(True, str(tmp_path / "missing" / "events"))
