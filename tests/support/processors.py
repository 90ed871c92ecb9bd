"""Custom logit processors as requests carry them: serialized, with all that they need.

Each is made from source text, in a module that a server cannot import: it is serialized by value.
"""

from __future__ import annotations

import json
from typing import Any

SOURCE = """
from sglang.srt.sampling.custom_logit_processor import (
    CustomLogitProcessor,
    ThinkingBudgetLogitProcessor,
)


class Forbids(CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        for row, parameters in enumerate(custom_param_list):
            logits[row, parameters["token_ids"]] = -float("inf")
        return logits


class Counts(CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        for row, parameters in enumerate(custom_param_list):
            parameters["calls"] = parameters.get("calls", 0) + 1
            if parameters["calls"] % 3 == 0:
                logits[row] = -float("inf")
                logits[row, 500 + parameters["calls"]] = 0.0
        return logits


class NeverTwice(CustomLogitProcessor):
    def __call__(self, logits, custom_param_list=None):
        for row, parameters in enumerate(custom_param_list):
            logits[row, list(parameters["__req__"].output_ids)] = -float("inf")
        return logits


class Thinks(ThinkingBudgetLogitProcessor):
    THINKING_START_TOKEN_ID = 28
    THINKING_END_TOKEN_ID = 30
    NEW_LINE_TOKEN_ID = 198
"""

PARAMETERS: dict[str, dict[str, Any]] = {
    "Forbids": {"token_ids": [28, 30, 284]},
    "Counts": {"of": "calls"},
    "NeverTwice": {"of": "tokens"},
    "Thinks": {"thinking_budget": 5},
}
"""Parameters for each; SGLang adds the request to those that are not empty."""


def serialized(name: str) -> str:
    """Return a processor of SOURCE as the field `custom_logit_processor` has it."""
    import dill  # type: ignore[import-untyped]

    module: dict[str, Any] = {"__name__": "processors"}
    exec(SOURCE, module)
    return json.dumps({"callable": dill.dumps(module[name]).hex()})


def body(name: str, **parameters: Any) -> dict[str, Any]:
    """Return what a request with this processor adds to its sampling parameters and to its body."""
    return {
        "custom_params": PARAMETERS[name] | parameters,
        "options": {"custom_logit_processor": serialized(name)},
    }
