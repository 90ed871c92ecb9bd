"""Draw requests, valid, borderline and broken, from the OpenAPI schema that the server serves.

A body begins as the schema says. Fields whose schema allows nearly anything, or whose valid values
the schema does not tell (token ids, sampling parameters), are drawn from what `FIELDS` has for
their names. Then some bodies are broken in one or two places.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

LEFT_OUT = {
    # Commands of an operator: they move weights and memory, write files or hold requests back.
    "/update_weight": "replaces the weights",
    "/update_weights": "replaces the weights",
    "/begin_weight_update": "replaces the weights",
    "/end_weight_update": "replaces the weights",
    "/init_weights": "connects to another process, and waits for it",
    "/destroy_weights": "connects to another process, and waits for it",
    "/send_weights": "connects to another process, and waits for it",
    "/get_remote_instance": "connects to another process, and waits for it",
    "/remote_instance": "connects to another process, and waits for it",
    "/weights_checker": "an operator's check of the weights",
    "/get_weights_by_name": "an operator's check of the weights",
    "/release_memory": "takes the weights away",
    "/resume_memory": "takes the weights away",
    "/pause_generation": "holds all requests back",
    "/continue_generation": "holds all requests back",
    "/slow_down": "holds all requests back",
    "/load_lora": "reads adapters from files",
    "/unload_lora": "reads adapters from files",
    "/scale_elastic": "changes the number of processes",
    "/pd_role": "changes the number of processes",
    "/start_profile": "writes files for an operator",
    "/stop_profile": "writes files for an operator",
    "/start_expert": "writes files for an operator",
    "/stop_expert": "writes files for an operator",
    "/dump_expert": "writes files for an operator",
    "/set_trace": "changes the log",
    "/configure_logging": "changes the log, and writes files",
    "/set_internal_state": "changes the scheduler",
    "/freeze_gc": "changes the process",
    "/hicache": "needs a second level of cache",
    "/get_hicache": "needs a second level of cache",
    "/add_external": "needs SGLang's own n-gram drafter",
    "/remove_external": "needs SGLang's own n-gram drafter",
    "/list_external": "needs SGLang's own n-gram drafter",
    "/health_generate": "the same as a request of one token",
    "/v1/audio": "needs a model that hears",
}
"""Beginnings of the routes that are not tried, and why."""
OFTEN = {"POST /generate": 24, "POST /v1/completions": 8, "POST /v1/chat/completions": 8}
"""How much more often than others a route is tried."""
DRAWN = 3
"""Requests drawn for each that is sent: hypothesis likes to vary the last one a little."""
VOCABULARY = 49152
"""Tokens of the model that is served; ids around it are borderline."""
LONGEST = 24
"""New tokens of most requests."""

TEXTS = st.sampled_from(
    [
        "The capital of France is",
        "one two three four f",
        "1, 2, 3, 4,",
        "a a a a a",
        "Hello",
        "é 🙂",
    ]
)
REGEXES = st.sampled_from(["[0-9]{3}", "(yes|no)", "[a-z]+", "x*"])
JSON_SCHEMAS = st.sampled_from(['{"type": "object"}', '{"type": "integer"}', '{"enum": ["a"]}'])
STOPS = st.sampled_from([" the", "\n", ",", " 3", "five", "."])


def _or(usual: SearchStrategy[Any], *borderline: object) -> SearchStrategy[Any]:
    """Draw a usual value five times of six, else a borderline one."""
    return st.integers(0, 5).flatmap(lambda n: st.sampled_from(borderline) if n == 5 else usual)


def _some(values: SearchStrategy[Any], most: int = 3) -> SearchStrategy[Any]:
    return values | st.lists(values, max_size=most)


TOKENS = _or(st.integers(0, VOCABULARY - 1), 0, -1, VOCABULARY - 1, VOCABULARY, 2**31, 2**62)
VALID_TOKENS = st.integers(0, VOCABULARY - 1)
COUNTS = _or(st.integers(1, LONGEST), 0, 1, -1, 200, 2**31, None)
PENALTIES = _or(st.floats(-2.0, 2.0), -2.1, 0, 2, 2.1)
LOGPROBS = _or(st.integers(0, 5), 0, 20, VOCABULARY, VOCABULARY + 1, -1, 10**6)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": _or(st.sampled_from(["user", "assistant", "system"]), "tool", "nobody", ""),
            "content": _or(TEXTS, "", None, [{"type": "text", "text": "Hi"}], [{"type": "image"}]),
        }
    ),
    min_size=1,
    max_size=3,
)
SAMPLING: dict[str, SearchStrategy[Any]] = {
    "max_new_tokens": COUNTS,
    "min_new_tokens": _or(st.integers(0, 6), 0, -1, LONGEST + 1, 2**31),
    "temperature": _or(st.floats(0.0, 2.0), 0, 1e-9, 1e30, -0.1, float("inf"), float("nan")),
    "top_p": _or(st.floats(0.05, 1.0), 0, 1, 1e-9, 1.01, -1),
    "top_k": _or(st.integers(1, 50), -1, 0, 1, VOCABULARY, 2**40),
    "min_p": _or(st.floats(0.0, 0.5), 0, 1, 1.5, -0.1),
    "frequency_penalty": PENALTIES,
    "presence_penalty": PENALTIES,
    "repetition_penalty": _or(st.floats(0.5, 1.9), 0, 1, 2, 2.5, -1),
    "stop": _or(_some(STOPS), "", [""], [], "z" * 5000),
    "stop_token_ids": st.lists(TOKENS, max_size=3),
    "stop_regex": _or(_some(REGEXES), "[", "(a+)+$", ""),
    "ignore_eos": st.booleans(),
    "no_stop_trim": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
    "n": _or(st.integers(1, 2), 0, -1),
    "regex": _or(REGEXES, "[", "", "(", "[0-9]{1,40}"),
    "json_schema": _or(JSON_SCHEMAS, "{", "", '{"type": "nothing"}', "[]", '{"$ref": "#/x"}'),
    "ebnf": _or(st.sampled_from(['root ::= "a" | "b"']), "root ::=", "x", ""),
    "structural_tag": _or(st.none(), "{", "{}", ""),
    "logit_bias": st.dictionaries(
        _or(VALID_TOKENS.map(str), "-1", str(VOCABULARY), "a", ""),
        _or(st.floats(-100, 100), float("inf"), 1e300, None),
        max_size=3,
    ),
    "sampling_seed": _or(st.integers(0, 2**31), -1, 2**63, 2**64),
    "custom_params": _or(st.none(), {}, {"thinking_budget": 3}, {"thinking_budget": "x"}, []),
    "stream_interval": _or(st.integers(1, 4), 0, -1),
    "beam_width": _or(st.none(), 1, 2, 0, -1, 10**6),
    "watermark": _or(st.none(), {}, {"method": "none"}, 3),
}


def _sampling_params() -> SearchStrategy[Any]:
    """Draw a few sampling parameters; most limit the new tokens."""
    names = st.lists(st.sampled_from(sorted(SAMPLING)), max_size=4, unique=True)
    limit = {"max_new_tokens": _or(st.integers(1, LONGEST), 1)}
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries(limit | {name: SAMPLING[name] for name in chosen})
    )


FIELDS: dict[str, SearchStrategy[Any]] = SAMPLING | {
    "text": _or(_some(TEXTS), "", [], [""], "word " * 400),
    "prompt": _or(_some(TEXTS) | st.lists(TOKENS, max_size=6), "", [], [[]], "word " * 400),
    "input": _or(_some(TEXTS), "", [], {}),
    "query": TEXTS,
    "items": _some(TEXTS),
    "documents": st.lists(TEXTS, max_size=3),
    "input_ids": _or(
        st.lists(VALID_TOKENS, min_size=1, max_size=8)
        | st.lists(TOKENS, max_size=6)
        | st.lists(st.lists(TOKENS, max_size=4), max_size=3),
        [],
        [[]],
        [1.5],
        ["a"],
    ),
    "input_embeds": _or(st.none(), [], [[]], [[0.0]], [[0.0] * 576] * 2, [[float("nan")] * 576]),
    "messages": MESSAGES,
    "sampling_params": _sampling_params(),
    "parameters": _or(st.just({"sampling_params": {"max_new_tokens": 4}}), {}, {"x": 1}),
    "instances": st.lists(_or(st.just({"text": "Hello"}), {}, {"text": ""}, {"x": 1}), max_size=2),
    "max_tokens": COUNTS,
    "max_completion_tokens": COUNTS,
    "max_output_tokens": COUNTS,
    "min_tokens": _or(st.integers(0, 6), -1, LONGEST + 1),
    "seed": _or(st.integers(0, 2**31), -1, 2**64),
    "n": SAMPLING["n"],
    "best_of": _or(st.none(), 0, 1, 2, -1),
    "return_logprob": st.booleans(),
    "logprob_start_len": _or(st.integers(-1, 3), -2, -5, 10**6),
    "top_logprobs_num": LOGPROBS,
    "top_logprobs": LOGPROBS,
    "logprobs": LOGPROBS | st.booleans(),
    "token_ids_logprob": st.lists(TOKENS, max_size=3),
    "label_token_ids": st.lists(TOKENS, max_size=3),
    "tokens": _some(st.lists(TOKENS, max_size=5)),
    "model": _or(st.just("default"), "", "another"),
    "rid": _or(st.none(), "", "same", ["a", "b"], "x" * 500),
    "session_params": _or(st.none(), {}, {"id": "none"}, {"id": "fuzz"}, {"id": 3}),
    "session_id": _or(st.just("fuzz"), "", None, "another"),
    "capacity_of_str_len": _or(st.just(1000), 0, -1, 2**40),
    "timeout": _or(st.floats(1, 5), 0, -1),
    "abort_all": st.just(False),
    "priority": _or(st.none(), 0, -1, 2**40),
    "lora_path": _or(st.none(), "", "nothing"),
    "custom_logit_processor": _or(st.none(), "", "x", "{}", '{"callable": "00"}'),
    "image_data": _or(st.none(), "", "nothing.png", []),
    "response_format": _or(
        st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
        {},
        {"type": "unknown"},
    ),
    "strategy": _or(st.none(), "off", "eagle:9x9x9", "", 3),
    "positional_embed_overrides": st.none(),
    "http_worker_ipc": st.none(),
    # A request of another's data-parallel rank or prefill server waits for that one.
    "bootstrap_host": st.none(),
    "background": st.just(False),
}
"""Values of fields by name; the schema tells the rest."""
BROKEN = st.sampled_from(
    [None, True, -1, 0, 2**63, 1e308, float("nan"), "", "x", "\ud83d\ude42", [], {}, [None], [[]]]
) | st.sampled_from([{"a": {"a": {}}}, [[[[1]]]], "-1", [-1], ["", None], 0.5])
"""Values that replace a field of a body that is broken."""
RAW = ("", "{", "null", "[]", "3", '"text"', '{"text": ', "{}" * 3, "[" * 500, "\x00", "{'a': 1}")
"""Bodies that cannot be read as a JSON object."""


@dataclass(frozen=True)
class Call:
    """One request: what to send where."""

    method: str
    path: str
    body: Any
    """The decoded JSON, None for no body."""
    raw: str | None = None
    """Sent as it is instead, where the body is not a JSON object."""


def calls(schema: Mapping[str, Any], number: int, count: int) -> list[Call]:
    """Return `count` requests for the routes of an OpenAPI `schema`; `number` is the seed."""
    unique: dict[str, Call] = {}

    @seed(number)
    @settings(
        max_examples=DRAWN * count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_any_call(schema))
    def collect(call: Call) -> None:
        unique[repr(call)] = call

    collect()
    return random.Random(number).sample(list(unique.values()), min(count, len(unique)))


def routes(schema: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return method and path of the routes that are tried."""
    return [
        (method.upper(), path)
        for path, methods in schema["paths"].items()
        if not any(path.startswith(beginning) for beginning in LEFT_OUT)
        for method in methods
        if method in ("get", "post", "put", "head", "delete")
    ]


def _any_call(schema: Mapping[str, Any]) -> SearchStrategy[Call]:
    tried = routes(schema)
    weighted = [route for route in tried for _ in range(OFTEN.get(" ".join(route), 1))]
    return st.sampled_from(weighted).flatmap(lambda route: _call(schema, *route))


def _call(schema: Mapping[str, Any], method: str, path: str) -> SearchStrategy[Call]:
    path_filled = path.replace("{model}", "default").replace("{response_id}", "resp_1")
    content = schema["paths"][path][method.lower()].get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return st.just(Call(method, path_filled, None))
    body = _broken(_value(schema, content["application/json"]["schema"], 3))
    return st.integers(0, 29).flatmap(
        lambda n: (
            st.sampled_from(RAW).map(lambda raw: Call(method, path_filled, None, raw))
            if n == 29
            else body.map(lambda value: Call(method, path_filled, value))
        )
    )


def _broken(bodies: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """Break one body of three in one or two places."""

    def breaks(body: Any) -> SearchStrategy[Any]:
        if not isinstance(body, dict) or not body:
            return st.just(body)
        names = st.lists(st.sampled_from(sorted(body)), min_size=1, max_size=2)
        return names.flatmap(
            lambda chosen: st.fixed_dictionaries({name: BROKEN for name in chosen}).map(
                lambda values: body | values
            )
        )

    return st.integers(0, 2).flatmap(lambda n: bodies.flatmap(breaks) if n == 2 else bodies)


def _value(schema: Mapping[str, Any], node: Mapping[str, Any], depth: int) -> SearchStrategy[Any]:
    """Return the values that a node of the schema describes, not deeper than `depth` objects."""
    if "$ref" in node:
        target: Any = schema
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return _value(schema, target, depth)
    for several in ("anyOf", "oneOf", "allOf"):
        if several in node:
            return st.one_of([_value(schema, each, depth) for each in node[several]])
    if "const" in node:
        return st.just(node["const"])
    if "enum" in node:
        return st.sampled_from(node["enum"])
    kind = node.get("type")
    if kind == "object":
        return _object(schema, node, depth)
    if kind == "array":
        if depth == 0:
            return st.just([])
        return st.lists(_value(schema, node.get("items", {}), depth - 1), max_size=3)
    return _SCALARS.get(kind, BROKEN)


_SCALARS: dict[object, SearchStrategy[Any]] = {
    "string": _or(TEXTS, "", "x"),
    "integer": _or(st.integers(0, 10), -1, 2**31, 2**63),
    "number": _or(st.floats(0, 2), -1, 1e300),
    "boolean": st.booleans(),
    "null": st.none(),
}


def _object(schema: Mapping[str, Any], node: Mapping[str, Any], depth: int) -> SearchStrategy[Any]:
    properties: Mapping[str, Any] = node.get("properties", {})
    if not properties or depth == 0:
        return st.dictionaries(st.sampled_from(["a", "b"]), BROKEN, max_size=2)
    values = {name: _field(schema, name, each, depth - 1) for name, each in properties.items()}
    always = set(node.get("required", ())) | ({"sampling_params"} & set(values))
    if {"text", "input_ids"} <= set(values):
        return st.sampled_from(["text", "text", "input_ids"]).flatmap(
            lambda prompt: _with(values, always | {prompt})
        )
    return _with(values, always)


def _with(values: Mapping[str, SearchStrategy[Any]], always: set[str]) -> SearchStrategy[Any]:
    """Draw the fields that `always` names, a few others, and mostly a small number of tokens."""
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"} & set(values)
    rest = sorted(set(values) - always - limits)
    few = st.lists(st.sampled_from(rest), max_size=4, unique=True) if rest else st.just([])
    small = {name: _or(st.integers(1, LONGEST), 0, -1, None) for name in limits}
    return few.flatmap(
        lambda chosen: st.fixed_dictionaries(
            {name: values[name] for name in [*sorted(always), *chosen]} | small
        )
    )


def _field(
    schema: Mapping[str, Any], name: str, node: Mapping[str, Any], depth: int
) -> SearchStrategy[Any]:
    return FIELDS[name] if name in FIELDS else _value(schema, node, depth)
