"""The rules of calls before they are split, and of each request with its prompt, as data.

A call of `GenerateReqInput` holds one request, or lists of fields for several. Runs anywhere; pure.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from tlt_sglang.admission.limits import Limits
from tlt_sglang.admission.rules import (
    INT32,
    INT64,
    Rule,
    Test,
    boolean,
    each,
    integer,
    mapping,
    not_json,
    number,
    problems,
    prompt,
    show,
    text,
    token_ids,
)
from tlt_sglang.admission.sampling import MAX_SAMPLES, sampling_problems
from tlt_sglang.admission.sampling import RULES as SAMPLING_RULES

MAX_LOGPROBS = 2**24
"""The most logprobs of one answer, of which each takes about 100 bytes in each process."""

HEALTH_CHECK = "HEALTH_CHECK"
"""SGLang does not answer requests whose id begins so while it is busy."""

Fields = Mapping[str, object]
"""The fields of a call or of one request, by name."""

_name: Test = text(1024, empty=False)
_NAMED = "a string of 1 to 1024 characters"

PER_REQUEST = (
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "lora_path",
    "custom_logit_processor",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
)
"""Fields that may be lists with one entry for each request, whose length SGLang does not check."""

RULES = (
    Rule("rid", _name, _NAMED),
    Rule("session_id", _name, _NAMED),
    Rule("text", text(), "a string of Unicode characters"),
    Rule("return_logprob", boolean, "true or false"),
    Rule(
        "top_logprobs_num",
        integer(0, lambda limits: limits.vocabulary),
        "an integer from 0 to {vocabulary}",
    ),
    Rule("token_ids_logprob", token_ids, "a list of token ids from 0 to {last_token}"),
    Rule("return_sampling_mask", boolean, "true or false"),
    Rule("stream", boolean, "true or false"),
    Rule("return_text_in_logprobs", boolean, "true or false"),
    Rule("return_flat_raw_top_logprobs", boolean, "true or false"),
    Rule("return_routed_experts", boolean, "true or false"),
    Rule("routed_experts_start_len", integer(0, INT32), f"an integer from 0 to {INT32}"),
    Rule("return_indexer_topk", boolean, "true or false"),
    Rule("lora_path", _name, _NAMED),
    Rule("custom_logit_processor", text(), "a string from CustomLogitProcessor.to_str()"),
    Rule("bootstrap_host", _name, _NAMED),
    Rule("bootstrap_port", integer(0, 65535), "a port from 0 to 65535"),
    Rule("bootstrap_room", integer(0, INT64), f"an integer from 0 to {INT64}"),
    Rule("bootstrap_pair_key", _name, _NAMED),
    Rule("decode_tp_size", integer(1, INT32), f"an integer from 1 to {INT32}"),
    Rule("routed_dp_rank", integer(0, INT32), f"an integer from 0 to {INT32}"),
    Rule("disagg_prefill_dp_rank", integer(0, INT32), f"an integer from 0 to {INT32}"),
    Rule("routing_key", text(), "a string"),
    Rule("conversation_id", text(), "a string"),
    Rule("require_reasoning", boolean, "true or false"),
    Rule("max_thinking_tokens", integer(0, INT32), f"an integer from 0 to {INT32}"),
    Rule("priority", integer(-INT64 - 1, INT64), f"an integer from {-INT64 - 1} to {INT64}"),
    Rule("extra_key", text(), "a string"),
    Rule("cache_salt", text(), "a string"),
    Rule("return_prompt_token_ids", boolean, "true or false"),
    Rule("session_params", mapping, "an object"),
    Rule(
        "positional_embed_overrides",
        not_json,
        "a PositionalEmbeds object, which only Engine.generate can pass",
    ),
)
"""The rules of one request without its prompt; SGLang itself checks the other fields."""

SESSION_RULES = (
    Rule("id", _name, _NAMED),
    Rule("rid", _name, _NAMED),
    Rule("offset", integer(0, INT32), f"an integer from 0 to {INT32}"),
    Rule("replace", boolean, "true or false"),
    Rule("drop_previous_output", boolean, "true or false"),
)
"""The rules of session_params."""

CALL_RULES = (
    Rule("rid", each(_name, alone=True), f"{_NAMED}, or a list of them"),
    Rule("text", each(text(), fewest=1, alone=True), "a string, or a list of strings"),
    Rule("received_time", number(0, 1e12), "a time in seconds"),
    Rule("data_parallel_rank", integer(0, INT32), f"an integer from 0 to {INT32}"),
    # SGLang compares these with numbers before it looks at the requests.
    *(rule for rule in RULES if rule.field in ("priority", "routed_dp_rank")),
)


def call_problems(call: Fields) -> Iterator[str]:
    """Yield a sentence for everything that keeps SGLang from splitting a call into requests."""
    limits = Limits(vocabulary=INT32, context=INT32, longest_prompt=INT32, hidden_size=INT32)
    yield from problems(CALL_RULES, call, limits)
    parameters = call.get("sampling_params")
    if parameters is not None and not _is_parameters(parameters):
        yield f"sampling_params is {show(parameters)}; it must be an object or a list of objects."
        return
    size = batch_size(call)
    if size is None:
        for field in ("rid", *PER_REQUEST):
            entries = call.get(field)
            if isinstance(entries, list) and field != "sampling_params":
                yield f"{field} is {show(entries)}; it must be a value where a call has one prompt."
    else:
        lists = list(PER_REQUEST)
        ids = call.get("token_ids_logprob")
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            lists.append("token_ids_logprob")
        for field in lists:
            entries = call.get(field)
            if isinstance(entries, list) and len(entries) != size:
                yield f"{field} has {len(entries)} entries, but the call has {size} prompts."
    yield from _answers(parameters, size or 1, limits)


def _answers(parameters: object, prompts: int, limits: Limits) -> Iterator[str]:
    """Yield a sentence if a call asks for no answer, or for too many."""
    rule = next(rule for rule in SAMPLING_RULES if rule.field == "n")
    for one in parameters if isinstance(parameters, list) else [parameters]:
        if not isinstance(one, dict):
            continue
        problem = rule.problem(one.get("n"), limits)
        count = prompts * (1 if problem else one.get("n") or 1)
        if count > MAX_SAMPLES:
            problem = f"The call asks for {count} answers, but must ask for at most {MAX_SAMPLES}."
        if problem is not None:
            yield problem
            return


def batch_size(call: Fields) -> int | None:
    """Return the number of prompts of a call in lists; None for a single request."""
    texts, token_ids = call.get("text"), call.get("input_ids")
    if texts is not None:
        return len(texts) if isinstance(texts, list) else None
    if token_ids is not None:
        several = isinstance(token_ids, list) and token_ids and not isinstance(token_ids[0], int)
        return len(token_ids) if several and isinstance(token_ids, list) else None
    embeds = call.get("input_embeds")
    if isinstance(embeds, list) and embeds and isinstance(embeds[0], list):
        return len(embeds) if embeds[0] and isinstance(embeds[0][0], list) else None
    return None


def tokens_problem(tokens: Sequence[object], limits: Limits) -> str | None:
    """Return a sentence if `tokens`, ids or lists of ids, cannot be decoded; None if they can."""
    rule = Rule("tokens", token_ids, "a list of token ids from 0 to {last_token}, or several")
    lists = tokens if tokens and isinstance(tokens[0], list) else [tokens]
    return next(filter(None, (rule.problem(ids, limits) for ids in lists)), None)


def request_problems(
    request: Fields, parameters: Fields, token_ids: Collection[int] | None, limits: Limits
) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with one request.

    `parameters` are its sampling parameters with the server's own defaults; `token_ids` is its
    prompt, None where it has embeddings or the scheduler knows its prompt.
    """
    yield from problems(RULES, request, limits)
    rid = str(request.get("rid"))
    if rid.startswith(HEALTH_CHECK) and request.get("log_metrics") is not False:
        yield f"rid is {show(rid)}; it must not begin as SGLang's own requests do, {HEALTH_CHECK}."
    session = request.get("session_params")
    if isinstance(session, dict):
        yield from _session(session, limits)
    yield from sampling_problems(parameters, limits)
    if token_ids is not None and not session:
        yield from _prompt(request, token_ids, limits)
    elif token_ids:
        yield from _tokens(token_ids, limits)
    if request.get("input_embeds") is not None:
        yield from _embeddings(request["input_embeds"], limits)
    yield from _start(request, None if session else token_ids, limits)
    yield from _logprobs(request, parameters, token_ids, limits)


def _session(session: Fields, limits: Limits) -> Iterator[str]:
    fields = {rule.field for rule in SESSION_RULES}
    for name in session.keys() - fields:
        yield f"session_params has the unknown field {show(name)}; it may have {_join(fields)}."
    for problem in problems(SESSION_RULES, session, limits):
        yield f"session_params: {problem}"


def _prompt(request: Fields, token_ids: Collection[int], limits: Limits) -> Iterator[str]:
    if not len(token_ids):
        text, ids = request.get("text"), request.get("input_ids")
        field = "text" if text == "" or (text is not None and ids is None) else "input_ids"
        yield f"{field} is {show(request.get(field))}; it must hold at least one token."
        return
    yield from _tokens(token_ids, limits)
    # SGLang itself refuses what is longer than the context.
    if limits.longest_prompt < len(token_ids) < limits.context and not limits.truncates:
        yield (
            f"The prompt has {len(token_ids)} tokens, but must have at most "
            f"{limits.longest_prompt}."
        )
    length = len(token_ids)
    for field in ("multi_item_delimiter_indices", "token_indices_to_pool"):
        inside = each(integer(0, length - 1))
        rule = Rule(field, inside, f"a list of indices of the prompt, from 0 to {length - 1}")
        problem = rule.problem(request.get(field), limits)
        if problem is not None:
            yield problem


def _tokens(token_ids: Collection[int], limits: Limits) -> Iterator[str]:
    rule = Rule("input_ids", prompt, "a list of token ids from 0 to {last_token}")
    problem = rule.problem(token_ids, limits)
    if problem is not None:
        yield problem


def _start(request: Fields, token_ids: Collection[int] | None, limits: Limits) -> Iterator[str]:
    # SGLang reads it only where logprobs are returned; with a session, the prompt is longer.
    reaches = token_ids is not None and request.get("return_logprob") is True
    length = len(token_ids or ()) if reaches else INT32
    end = "the length of the prompt, which is" if reaches else ""
    allowed = f"-1, or an integer from 0 to {end} {length}".replace("  ", " ")
    rule = Rule("logprob_start_len", integer(-1, length), allowed)
    problem = rule.problem(request.get("logprob_start_len"), limits)
    if problem is not None:
        yield problem


def _logprobs(
    request: Fields, parameters: Fields, prompt_ids: Collection[int] | None, limits: Limits
) -> Iterator[str]:
    """Yield a sentence if a request asks for more logprobs than the processes can hold."""
    if request.get("return_logprob") is not True or request.get("return_flat_raw_top_logprobs"):
        return
    start, most = request.get("logprob_start_len"), parameters.get("max_new_tokens", 128)
    top, ids = request.get("top_logprobs_num"), request.get("token_ids_logprob")
    if not isinstance(start, int) or not isinstance(top, int):
        return
    scored = max(0, len(prompt_ids or ()) - start) if start >= 0 else 0
    tokens = scored + min(most if isinstance(most, int) else limits.context, limits.context)
    entries = tokens * max(top, len(ids) if isinstance(ids, list) else 0)
    if entries > MAX_LOGPROBS:
        yield (
            f"top_logprobs_num and token_ids_logprob ask for {entries} logprobs of {tokens} "
            f"tokens; a request may have at most {MAX_LOGPROBS}."
        )


def _embeddings(embeddings: object, limits: Limits) -> Iterator[str]:
    allowed = f"a list of lists of {limits.hidden_size} finite numbers, one for each token"
    if not isinstance(embeddings, list) or not embeddings:
        yield f"input_embeds is {show(embeddings)}; it must be {allowed}."
        return
    for row in embeddings:
        if not isinstance(row, list) or len(row) != limits.hidden_size:
            size = f"of {len(row)} entries" if isinstance(row, list) else show(row)
            yield f"input_embeds contains a row {size}; it must be {allowed}."
            return
        for value in row:
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                yield f"input_embeds contains {show(value)}; it must be {allowed}."
                return


def _is_parameters(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(entry, dict) for entry in value)
    return isinstance(value, dict)


def _join(names: Collection[str]) -> str:
    *others, last = sorted(names)
    return f"{', '.join(others)} and {last}"
