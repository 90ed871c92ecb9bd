"""The last line of defence: which exceptions end a request, which the engine, and how."""

from __future__ import annotations

import errno
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.engine import shield
from tlt_sglang.errors import BadRequest, ConfigError, TltError

pytestmark = pytest.mark.sglang

OF_REQUESTS = (
    ValueError("bad"),
    TypeError("bad"),
    KeyError("token_ids"),
    IndexError("bad"),
    AssertionError(),
    OverflowError("bad"),
    RecursionError("bad"),
    RuntimeError("index 49152 is out of bounds"),
    BadRequest("bad"),
)
OF_THE_ENGINE = (
    MemoryError(),
    OSError(errno.ENOSPC, "no space"),
    SystemError("bad"),
    ConfigError("bad"),
    TltError("bad"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("NCCL error in: ProcessGroupNCCL"),
)


@pytest.mark.parametrize("error", OF_REQUESTS, ids=repr)
def test_exceptions_of_requests(error: Exception) -> None:
    assert shield.is_of_request(error)


@pytest.mark.parametrize("error", OF_THE_ENGINE, ids=repr)
def test_exceptions_of_the_engine(error: Exception) -> None:
    assert not shield.is_of_request(error)


def test_the_message_is_one_line() -> None:
    message = shield.sentence(ValueError("a\nb " + "x" * 1000))
    assert "\n" not in message and len(message) < 400 and "ValueError: a b" in message
    assert "AssertionError" in shield.sentence(AssertionError())


# ---- receiving -----------------------------------------------------------------------------------


class Intake:
    """A scheduler with one queued request."""

    def __init__(self) -> None:
        self.waiting_queue: list[Any] = [SimpleNamespace(rid="before")]
        self.grammar_manager = SimpleNamespace(grammar_queue=[SimpleNamespace(rid="before")])
        self.session = SimpleNamespace(streaming=True, aborted=0)
        self.session.abort_req = self.abort_session
        self.session_controller = {"s": self.session}
        self.sent: list[Any] = []

    def abort_session(self) -> None:
        self.session.aborted += 1

    def _tokenized_requests(self, received: Any) -> tuple[Any, ...]:
        return (received,) if hasattr(received, "rid") else ()

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        self.sent.append((abort_req, req))


def arrived(session: str | None = None) -> Any:
    params = SimpleNamespace(id=session) if session else None
    return SimpleNamespace(rid="new", session_params=params)


def test_a_request_that_raises_is_answered_and_taken_back() -> None:
    request = arrived("s")
    intake: Any = Intake()

    def receive(scheduler: Any, recv_req: Any, **options: Any) -> None:
        scheduler.waiting_queue.append(SimpleNamespace(rid="new"))
        scheduler.grammar_manager.grammar_queue.append(SimpleNamespace(rid="new"))
        raise KeyError("colour")

    shield.receive(receive, intake, request, mm_input_error=None)
    assert [each.rid for each in intake.waiting_queue] == ["before"]
    assert [each.rid for each in intake.grammar_manager.grammar_queue] == ["before"]
    assert intake.session.aborted == 1
    ((abort, to),) = intake.sent
    assert to is request and abort.rid == "new"
    assert abort.finished_reason["status_code"] == 400
    assert "KeyError: 'colour'" in abort.finished_reason["message"]


def test_what_arrives_after_a_request_that_raises_is_processed() -> None:
    intake: Any = Intake()
    processed: list[Any] = []

    def process(received: Any) -> None:
        for each in received:
            each.positional_embed_overrides.reconstruct(0)
            processed.append(each)

    command: Any = SimpleNamespace(positional_embed_overrides=SimpleNamespace(reconstruct=id))
    shield.process(process, intake, [arrived_with(0), command])
    assert processed == [command]
    ((abort, _),) = intake.sent
    assert "'int' object has no attribute 'reconstruct'" in abort.finished_reason["message"]
    with pytest.raises(AttributeError):  # a command is not a request
        shield.process(process, intake, [SimpleNamespace()])
    shield.process(processed.append, intake, [])
    assert processed == [command, []]


def arrived_with(overrides: object) -> Any:
    return SimpleNamespace(rid="new", positional_embed_overrides=overrides)


def test_a_fault_of_the_engine_goes_on() -> None:
    intake: Any = Intake()

    def receive(scheduler: Any, recv_req: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        shield.receive(receive, intake, arrived())
    assert intake.sent == []


# ---- building a batch ----------------------------------------------------------------------------


def scheduled(rid: str = "a", **fields: Any) -> Any:
    request = SimpleNamespace(
        rid=rid,
        tokenizer=None,
        output_ids=[],
        sampling_params=SimpleNamespace(min_new_tokens=0),
        custom_logit_processor=None,
        grammar=None,
        to_finish=None,
        finished_reason=None,
    )
    vars(request).update(fields)
    return request


@dataclass
class Together:
    """A batch of these requests."""

    reqs: Sequence[Any]
    device: str = "cpu"


def test_only_the_request_that_raises_is_aborted() -> None:
    good, bad = scheduled("good"), scheduled("bad")
    bad.sampling_params.broken = True

    def build(batch: Any, vocab_size: int) -> Any:
        weakref.ref(batch)  # SGLang's penalties refer to it so
        for request in batch.reqs:
            if getattr(request.sampling_params, "broken", False):
                raise TypeError("broken")
        return SimpleNamespace(custom_logit_processor=None, custom_params=None)

    shield.sampling_info(build, Together([good, bad]), 8)
    assert good.to_finish is None
    assert bad.to_finish.status_code == 400 and "TypeError: broken" in bad.to_finish.message
    assert bad.sampling_params.temperature == 1.0 and bad.sampling_params.top_k == 1


def test_what_cannot_be_attributed_goes_on() -> None:
    def build(batch: Any, vocab_size: int) -> Any:
        if len(batch.reqs) > 1:
            raise RuntimeError("only together")

    requests = [scheduled("a"), scheduled("b")]
    with pytest.raises(RuntimeError, match="only together"):
        shield.sampling_info(build, SimpleNamespace(reqs=requests), 8)
    assert all(request.to_finish is None for request in requests)


# ---- logit processors ----------------------------------------------------------------------------


def call(processor: Any, requests: list[Any], logits: torch.Tensor) -> torch.Tensor:
    entry = SimpleNamespace(processor=processor, rows=list(range(len(requests))))
    info = SimpleNamespace(
        custom_logit_processor={1: entry},
        custom_params=[request.params for request in requests],
    )
    shield.sampling_info(lambda batch, size: info, SimpleNamespace(reqs=requests), logits.shape[1])
    result: torch.Tensor = entry.processor(logits, info.custom_params)
    return result


def rows(*params: Any) -> list[Any]:
    return [Scheduled(f"r{i}", each) for i, each in enumerate(params)]


class Scheduled(SimpleNamespace):
    """A request that can be referred to weakly."""

    def __init__(self, rid: str, params: Any) -> None:
        super().__init__(**vars(scheduled(rid)), params=params)


def forbid(logits: torch.Tensor, params: Any) -> torch.Tensor:
    tokens = params[0]["token_ids"]
    assert all(each["token_ids"] == tokens for each in params)
    logits[..., tokens] = -torch.inf
    return logits


def test_a_processor_sees_its_parameters_and_changes_its_rows() -> None:
    logits = torch.zeros(2, 4)
    result = call(forbid, rows({"token_ids": [1]}, {"token_ids": [1]}), logits)
    assert result.tolist() == [[0.0, -torch.inf, 0.0, 0.0]] * 2
    passed: list[Any] = []

    def look(logits: torch.Tensor, params: Any) -> torch.Tensor:
        passed.extend(params)
        return logits

    call(look, rows(None, {"a": 1}), logits)
    assert passed == [None, {"a": 1}]


def test_a_processor_that_cannot_take_several_rows_takes_each() -> None:
    """SGLang's own processor of forbidden tokens asserts that all requests forbid the same."""
    requests = rows({"token_ids": [1]}, {"token_ids": [2]})
    result = call(forbid, requests, torch.zeros(2, 3))
    assert result.tolist() == [[0.0, -torch.inf, 0.0], [0.0, 0.0, -torch.inf]]
    assert all(request.to_finish is None for request in requests)


def test_a_processor_that_raises_ends_its_own_request() -> None:
    requests = rows({"token_ids": [1]}, {}, None)
    result = call(forbid, requests, torch.ones(3, 3))
    assert result.tolist() == [[1.0, -torch.inf, 1.0], [0.0] * 3, [0.0] * 3]
    assert requests[0].to_finish is None
    assert "KeyError: 'token_ids'" in requests[1].to_finish.message
    assert "TypeError" in requests[2].to_finish.message


@pytest.mark.parametrize("result", [None, torch.zeros(1), torch.zeros(2, 3), "x"])
def test_a_processor_that_returns_something_else(result: Any) -> None:
    (request,) = requests = rows(None)
    call(lambda logits, params: result, requests, torch.zeros(1, 3))
    assert "must return a tensor of shape (1, 3)" in request.to_finish.message


@pytest.mark.parametrize("value", [float("nan"), -torch.inf, torch.inf])
def test_rows_from_which_no_token_can_be_drawn(value: float) -> None:
    (request,) = requests = rows(None)
    result = call(lambda logits, params: logits + value, requests, torch.ones(1, 3))
    assert result.tolist() == [[0.0, 0.0, 0.0]]
    assert shield.NOTHING_TO_DRAW in request.to_finish.message


# ---- examining an answer -------------------------------------------------------------------------


def test_an_answer_whose_examination_raises_ends() -> None:
    request = scheduled()
    with shield.Examination(request):
        raise IndexError("pattern")
    assert request.finished_reason.status_code == 400
    assert "IndexError: pattern" in request.finished_reason.message
    with pytest.raises(MemoryError), shield.Examination(request):
        raise MemoryError


def test_a_grammar_that_ends_before_the_fewest_tokens() -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    failed = FINISH_ABORT("Grammar accept_token failed: Tokens not accepted: 0", 500)
    grammar = SimpleNamespace(accepted_tokens=[33, 34, 35])
    request = scheduled(output_ids=[33, 34, 35, 0], to_finish=failed, grammar=grammar)
    request.sampling_params.min_new_tokens = 8
    with shield.Examination(request):
        pass
    assert request.to_finish.status_code == 400
    assert request.to_finish.message.startswith(
        "min_new_tokens is 8, but the grammar of the request ends after 3 tokens"
    )
    request = scheduled(output_ids=[], to_finish=failed)
    with shield.Examination(request):
        pass
    assert "allows no token after 0 tokens" in request.to_finish.message


def test_other_ends_stay() -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    ending = FINISH_ABORT("Aborted by AbortReq.")
    request = scheduled(to_finish=ending)
    with shield.Examination(request):
        pass
    assert request.to_finish is ending
