"""How SGLang's streams, calls and errors become one sentence with a status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tlt_sglang.engine import admit
from tlt_sglang.errors import BadRequest

pytestmark = pytest.mark.sglang


def event(**content: Any) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def abort(status: int | None, ids: list[int]) -> bytes:
    reason = {"type": "abort", "message": "bad", "status_code": status, "err_type": None}
    return event(text="", output_ids=ids, meta_info={"id": "a", "finish_reason": reason})


TOKEN = event(text="a", output_ids=[5], meta_info={"finish_reason": None})


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (event(error={"message": "bad", "code": 400}), (400, "bad")),
        (abort(400, []), (400, "bad")),
        (abort(503, []), (503, "bad")),
        (abort(None, []), None),
        (abort(400, [5]), (400, "bad")),
        (TOKEN, None),
        (event(text='"type":"abort"', output_ids=[5], meta_info={"finish_reason": None}), None),
    ],
)
def test_refusals_in_streams(first: bytes, expected: tuple[int, str] | None) -> None:
    assert admit.refusal_in(first) == expected


@pytest.mark.parametrize(
    ("events", "status"),
    [([], 200), ([TOKEN, TOKEN], 200), ([event(error={"message": "bad", "code": 400})], 400)],
)
def test_streams_keep_their_events(events: list[bytes], status: int) -> None:
    async def body() -> AsyncIterator[bytes]:
        for each in events:
            yield each

    async def run() -> None:
        response = SimpleNamespace(status_code=200, body_iterator=body(), background=None)
        result: Any = await admit.stream(response, True)
        assert result.status_code == status
        if status == 200:
            assert [each async for each in result.body_iterator] == events
        else:
            assert json.loads(result.body) == {"error": {"message": "bad"}}

    asyncio.run(run())


def test_calls_that_sglang_cannot_split() -> None:
    def split(call: Any) -> None:
        raise AttributeError("'str' object has no attribute 'get'")

    with pytest.raises(BadRequest, match="a field of a wrong type or form: 'str' object has no"):
        admit.split(split, SimpleNamespace(text="a"))
    with pytest.raises(ValueError, match=r"^text is 5; it must be"):
        admit.split(split, SimpleNamespace(text=5))


@pytest.mark.parametrize("serialized", ["", "x", "{}", '{"callable": "00"}', '{"callable": 5}'])
def test_processors_that_cannot_be_loaded(serialized: str) -> None:
    with pytest.raises(BadRequest, match=r"^custom_logit_processor cannot be loaded"):
        admit.load_processor(serialized)


def test_a_processor_that_can_be_loaded() -> None:
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    assert callable(admit.load_processor(DisallowedTokensLogitsProcessor.to_str()))


def small_manager() -> Any:
    """Return the limits of a model that reads eight tokens, and no images."""
    return SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=8, hidden_size=4),
        context_len=64,
        num_reserved_tokens=0,
        max_req_input_len=None,
        allow_auto_truncate=False,
        preferred_sampling_params=None,
        mm_processor=None,
    )


def test_the_clients_code_is_not_loaded_where_sglang_refuses_it() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(input_ids=[1], sampling_params={}, custom_logit_processor="code")
    manager = small_manager()

    def refuse(*arguments: object) -> None:
        raise ValueError("not enabled")

    with pytest.raises(ValueError, match="not enabled"):
        admit.validated(refuse, manager, request, [1])
    with pytest.raises(BadRequest, match="custom_logit_processor cannot be loaded"):
        admit.validated(lambda *arguments: None, manager, request, [1])
    with pytest.raises(BadRequest, match="input_ids contains 8"):
        admit.validated(refuse, manager, request, [8])


class Manager:
    """A tokenizer manager that would send each request before it looks at the next."""

    tokenizer = object()

    def __init__(self) -> None:
        self.checked: list[list[int]] = []

    def _should_use_batch_tokenization(self, batch_size: int, call: Any) -> bool:
        return False

    async def _tokenize_texts(self, texts: list[str]) -> tuple[list[list[int]], None]:
        return [list(map(len, text.split())) for text in texts], None

    def _validate_one_request(self, request: Any, token_ids: list[int]) -> None:
        if not token_ids:
            raise BadRequest("empty")
        self.checked.append(token_ids)

    def _create_tokenized_object(self, request: Any, text: str | None, token_ids: Any) -> None:
        assert (text is None) == (request.text is None)


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"text": ["one three", "four"]}, [[3, 5], [4]]),
        ({"input_ids": [[3, 5], [4]]}, [[3, 5], [4]]),
        ({"text": ["one", ""]}, None),
        ({"input_ids": [[3], []]}, None),
    ],
)
def test_all_requests_of_a_call_are_checked_first(
    fields: dict[str, Any], prompts: list[list[int]] | None
) -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    call = GenerateReqInput(**fields, sampling_params={})
    call.normalize_batch_and_arguments()
    sent: list[list[int] | None] = []

    async def send(manager: Any, call: Any) -> AsyncIterator[int]:
        for index in range(call.batch_size):
            sent.append(call[index].input_ids)
            yield index

    async def run() -> list[Any]:
        manager: Any = Manager()
        original: Any = send
        return [answer async for answer in admit.batch(original, manager, call)]

    if prompts is None:
        with pytest.raises(BadRequest, match="empty"):
            asyncio.run(run())
        assert sent == []
    else:
        assert asyncio.run(run()) == [0, 1]
        assert sent == prompts


def test_ids_of_images_are_those_of_a_model_that_sees() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(input_ids=[], audio_data={"url": "x"}, sampling_params={})
    manager = small_manager()
    for ids in ([], [8]):
        with pytest.raises(BadRequest, match="input_ids"):
            admit.validated(lambda *arguments: None, manager, request, ids)
    manager.mm_processor = object()
    with pytest.raises(BadRequest, match="input_ids"):
        admit.validated(lambda *arguments: None, manager, request, [])
    admit.validated(lambda *arguments: None, manager, request, [8])
