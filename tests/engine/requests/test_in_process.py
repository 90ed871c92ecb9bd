"""The same rules hold for an engine without HTTP, as RL stacks embed it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.launching import run_file
from tests.support.tiny import make_drafter, make_target

PROGRAM = """
import json
import sys

import sglang

CALLS = [
    {"input_ids": [64]},
    {"input_ids": [1, -1]},
    {"input_ids": [[1, 2], [2**62]]},
    {"input_ids": [[1, 2], []]},
    {"input_ids": []},
    {"input_ids": [1.5]},
    {"input_ids": "ids"},
    {"sampling_params": {"stop_token_ids": [64]}},
    {"sampling_params": {"temperature": float("nan")}},
    {"sampling_params": {"temperature": float("inf")}},
    {"sampling_params": {"top_p": float("nan")}},
    {"sampling_params": {"ignore_eos": "no"}},
    {"sampling_params": {"max_new_tokens": 1.5}},
    {"sampling_params": {"max_new_tokens": "8"}},
    {"sampling_params": {"n": "x"}},
    {"sampling_params": {"colour": "red"}},
    {"sampling_params": {"is_normalized": True}},
    {"sampling_params": {"logit_bias": {5: 1.0}}},
    {"sampling_params": {"logit_bias": {"5": float("inf")}}},
    {"sampling_params": {"custom_params": {"a": object()}}},
    {"sampling_params": [{"temperature": 0}, 5], "input_ids": [[1], [2]]},
    {"sampling_params": [{"temperature": 0}], "input_ids": [[1], [2]]},
    {"sampling_params": 5},
    {"return_logprob": True, "top_logprobs_num": 65},
    {"return_logprob": True, "logprob_start_len": -2},
    {"return_logprob": True, "token_ids_logprob": [64]},
    {"return_logprob": "yes"},
    {"rid": ""},
    {"priority": "high"},
    {"session_params": {"id": 5}},
]

if __name__ == "__main__":
    engine = sglang.Engine(
        model_path=sys.argv[1], skip_tokenizer_init=True, max_total_tokens=4096, device="cpu",
        mem_fraction_static=0.9, speculative_draft_model_path=sys.argv[2], log_level="critical",
    )
    good = {
        "input_ids": [1, 2, 3],
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    before = engine.generate(**good)["output_ids"]
    answers = []
    for call in CALLS:
        try:
            answers.append(engine.generate(**(good | call)))
        except ValueError as error:
            answers.append(str(error))
    after = engine.generate(**good)["output_ids"]
    left = len(engine.tokenizer_manager.rid_to_state)
    print(json.dumps({"answers": answers, "same": before == after, "left": left}))
    engine.shutdown()
"""


def test_bad_requests_raise_value_error(tmp_path: Path) -> None:
    """They leave nothing behind, and the engine goes on."""
    target = str(make_target(tmp_path / "target", "llama", vocab_size=64))
    drafter = str(make_drafter(tmp_path / "drafter", Path(target), "eagle"))
    environment = {"SGLANG_USE_CPU_ENGINE": "1", "TLT_CONFIG": '{"policy": "random"}'}
    done = run_file(PROGRAM, tmp_path, target, drafter, environment=environment)
    assert done.status == 0, done.err[-4000:]
    result = json.loads(done.out.splitlines()[-1])
    assert [answer for answer in result["answers"] if not isinstance(answer, str)] == []
    assert all(0 < len(answer) < 500 for answer in result["answers"]), result["answers"]
    assert result["same"] and result["left"] == 0
