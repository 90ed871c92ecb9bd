"""The rules of sampling parameters, as data, and what they say of each other. Runs anywhere; pure.

The ranges are those of SGLang's `SamplingParams.verify` where it has one; the others follow from
the types in which the scheduler holds a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from tlt_sglang.admission import stop_regex
from tlt_sglang.admission.limits import Limits
from tlt_sglang.admission.rules import (
    INT32,
    INT64,
    Rule,
    Test,
    biases,
    boolean,
    each,
    integer,
    mapping,
    number,
    problems,
    show,
    text,
    token_ids,
)

MAX_SAMPLES = 65536
"""The most answers that one call may ask for."""
MAX_STOPS = 32
MAX_STOP_LENGTH = 4096
MAX_REGEX_LENGTH = 256
"""Bytes of a stop regex, as in SGLang."""
MAX_GRAMMAR = 262144
MAX_GRAMMAR_REGEX = 8192
MAX_NESTING = 64
"""The deepest JSON of a schema; xgrammar needs minutes for one of thousands."""

PREDICTED_OUTPUT = "predicted_output"
"""Name in `custom_params` of the token ids that the client expects as output."""
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
INTERNAL = frozenset(
    {
        "is_normalized",
        "stop_strs",
        "stop_regex_strs",
        "stop_str_max_len",
        "stop_regex_max_len",
    }
)
"""Fields of SGLang's parameters that it computes itself."""


def _scalars(value: object, limits: Limits) -> Iterator[object]:
    """JSON values, in a list or an object at most."""
    yield from mapping(value, limits)
    for entry in value.values() if isinstance(value, dict) else ():
        parts = entry.values() if isinstance(entry, dict) else entry
        for part in parts if isinstance(entry, (dict, list)) else (entry,):
            if part is not None and not isinstance(part, (bool, int, float, str)):
                yield entry
            elif isinstance(part, int) and part.bit_length() > 63:
                yield part


_count = integer(0, INT32)
_stops: Test = each(text(MAX_STOP_LENGTH, empty=False), MAX_STOPS, alone=True)

RULES = (
    Rule("max_new_tokens", _count, f"an integer from 0 to {INT32}"),
    Rule("min_new_tokens", _count, f"an integer from 0 to {INT32}"),
    Rule("n", integer(1, MAX_SAMPLES), f"an integer from 1 to {MAX_SAMPLES}"),
    Rule("beam_width", integer(1, 1024), "an integer from 1 to 1024"),
    Rule("temperature", number(0, 1e30), "a number from 0 to 1e30"),
    Rule("top_p", number(0, 1, above=True), "a number above 0 and at most 1"),
    Rule(
        "top_k",
        integer(1, INT32, besides=(-1,)),
        f"an integer from 1 to {INT32}, or -1 for the whole vocabulary",
    ),
    Rule("min_p", number(0, 1), "a number from 0 to 1"),
    Rule("frequency_penalty", number(-2, 2), "a number from -2 to 2"),
    Rule("presence_penalty", number(-2, 2), "a number from -2 to 2"),
    Rule("repetition_penalty", number(1e-10, 2), "a number from 1e-10 to 2"),
    Rule(
        "stop",
        _stops,
        f"a string, or a list of at most {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters",
    ),
    Rule("stop_token_ids", token_ids, "a list of token ids from 0 to {last_token}"),
    Rule(
        "stop_regex",
        _stops,
        f"a regex, or a list of at most {MAX_STOPS}, of 1 to {MAX_REGEX_LENGTH} bytes",
    ),
    Rule("json_schema", text(MAX_GRAMMAR), f"a string of at most {MAX_GRAMMAR} characters"),
    Rule("regex", text(MAX_GRAMMAR_REGEX), f"a string of at most {MAX_GRAMMAR_REGEX} characters"),
    Rule("ebnf", text(MAX_GRAMMAR), f"a string of at most {MAX_GRAMMAR} characters"),
    Rule("structural_tag", text(MAX_GRAMMAR), f"a string of at most {MAX_GRAMMAR} characters"),
    Rule("ignore_eos", boolean, "true or false"),
    Rule("skip_special_tokens", boolean, "true or false"),
    Rule("spaces_between_special_tokens", boolean, "true or false"),
    Rule("no_stop_trim", boolean, "true or false"),
    Rule("ebnf_full_assistant", boolean, "true or false"),
    Rule("stream_interval", integer(1, INT32), f"an integer from 1 to {INT32}"),
    Rule(
        "logit_bias",
        biases,
        "an object with token ids from 0 to {last_token}, as strings, and numbers from -1e20 to "
        "1e20",
    ),
    Rule(
        "sampling_seed",
        integer(-INT64 - 1, INT64),
        f"an integer from {-INT64 - 1} to {INT64}",
    ),
    Rule(
        "custom_params",
        _scalars,
        "an object of strings, numbers of 64 bits, booleans and nulls, or of lists and objects of "
        "them",
    ),
)

CUSTOM_RULES = (Rule(PREDICTED_OUTPUT, token_ids, "a list of token ids from 0 to {last_token}"),)
"""The rules of what stands in `custom_params` for us; the rest is a logit processor's."""


def sampling_problems(parameters: Mapping[str, object], limits: Limits) -> Iterator[str]:
    """Yield a sentence for everything that is wrong with one request's sampling parameters."""
    for name in sorted(INTERNAL & parameters.keys()):
        yield f"{name} cannot be set by a request; leave it out."
    # Only where each field is valid by itself does it say anything about another.
    sentences = list(problems(RULES, parameters, limits))
    custom = parameters.get("custom_params")
    if not sentences and isinstance(custom, Mapping):
        sentences = list(problems(CUSTOM_RULES, custom, limits))
    yield from sentences
    if not sentences:
        yield from _lengths(parameters)
        yield from _regexes(parameters)
        yield from _grammars(parameters)


def _lengths(parameters: Mapping[str, object]) -> Iterator[str]:
    fewest = parameters.get("min_new_tokens")
    # An absent field is SGLang's default; null is as many as the context holds.
    most = parameters.get("max_new_tokens", 128)
    if isinstance(fewest, int) and isinstance(most, int) and fewest > most:
        yield f"min_new_tokens is {fewest}; it must be at most max_new_tokens, which is {most}."


def _regexes(parameters: Mapping[str, object]) -> Iterator[str]:
    regexes = parameters.get("stop_regex") or ()
    for regex in [regexes] if isinstance(regexes, str) else regexes:  # type: ignore[attr-defined]
        if len(regex.encode()) > MAX_REGEX_LENGTH:
            yield f"stop_regex is {show(regex)}; it must be of 1 to {MAX_REGEX_LENGTH} bytes."
            continue
        reason = stop_regex.why_not(regex)
        if reason is not None:
            yield f"stop_regex is {show(regex)}, which cannot be used, because {reason}."


def _grammars(parameters: Mapping[str, object]) -> Iterator[str]:
    names = [name for name in GRAMMARS if parameters.get(name)]
    if len(names) > 1:
        yield f"{' and '.join(names)} are set together, but a request may have one of them."
    for name in {"json_schema", "structural_tag"}.intersection(names):
        value = str(parameters[name])
        depth = nesting(value)
        if depth > MAX_NESTING:
            yield f"{name} is {depth} levels deep; it must be at most {MAX_NESTING} levels deep."
            continue
        try:
            json.loads(value)
        except ValueError as error:
            yield f"{name} is {show(value)}, which is not valid JSON: {error}."


def nesting(value: str) -> int:
    """Return how deep the brackets of a JSON text are nested; strings are skipped."""
    depth = deepest = 0
    quoted = escaped = False
    for character in value:
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest
