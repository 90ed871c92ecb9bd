"""Every way in which SGLang changes the logits of a request, and that verification knows it.

A version of SGLang that adds one fails a test here. Look up then what the new one does, make
`patches/eagle_utils.py` do it to the rows that are verified (the shortcut of greedy batches must
step aside for it), and add it to the table.

The tests import SGLang themselves, so that collecting them does not.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.sampling import logits
from tlt_sglang.upstream import versions

CHANGES = {
    "acc_additive_penalties": "exact on CPU; on GPUs one token a step",
    "acc_scaling_penalties": "the same",
    "penalizer_orchestrator": "where the two come from",
    "logit_bias": "eagle_sample",
    "grammars": "where the mask comes from",
    "grammar_mask": "eagle_sample, which is handed the mask of every row",
    "has_custom_logit_processor": "one token a step",
    "custom_logit_processor": "the same",
    "custom_params": "an argument of the processor",
    "has_watermark_candidates": "eagle_sample",
    "watermark_keys": "the same",
    "watermark_context_windows": "the same",
    "watermark_enabled": "the same",
    "watermark_candidates_host": "the same",
}
"""The fields of a batch that change logits, and who applies them under speculation."""

SAMPLES = {
    *("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "max_top_k"),
    *("is_all_greedy", "is_any_greedy", "npu_top_k_top_p_eligible"),
    *("need_top_p_sampling", "need_top_k_sampling", "need_min_p_sampling"),
}
"""The fields that say how a token is drawn from the logits."""

REPORTS = {
    *("vocab_size", "device", "rids_int", "bootstrap_room_ids_int", "return_sampling_masks"),
    *("return_sampling_support_logprobs", "sampling_mask_batch_indices", "sampling_mask_top_ks"),
    "sampling_support_logprobs_capture_indices",
}
"""The fields that change neither."""

PARAMETERS = {
    # Of the text: how long it is, where it stops, how it is written.
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "ignore_eos", "no_stop_trim"),
    *("skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "stop_strs"),
    *("stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"),
    # Of how many answers there are, and of drawing a token.
    *("n", "beam_width", "temperature", "top_p", "top_k", "min_p", "sampling_seed"),
    # Of the logits: penalties, bias, grammars, processors, watermark.
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens"),
    *("logit_bias", "json_schema", "regex", "ebnf", "structural_tag", "ebnf_full_assistant"),
    *("custom_params", "watermark"),
}
"""The sampling parameters of a request."""

STEPS = {
    "sglang.srt.model_executor.model_runner:ModelRunner.sample": {
        *("_preprocess_logits", "clone", "force", "sampler"),
    },
    "sglang.srt.model_executor.model_runner:ModelRunner._preprocess_logits": {
        *("apply_logits_bias", "apply_logits_bias_with_observer"),
    },
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias": {
        *("_apply_pre_grammar_logits_transforms", "apply"),
        "_apply_post_grammar_logits_transforms",
    },
    "sglang.srt.sampling.sampling_batch_info:"
    "SamplingBatchInfo._apply_pre_grammar_logits_transforms": {
        *("add_", "apply_scaling_penalties", "apply"),
    },
    "sglang.srt.sampling.sampling_batch_info:"
    "SamplingBatchInfo._apply_post_grammar_logits_transforms": {"add_"},
    "sglang.srt.layers.sampler:Sampler._preprocess_logits": {
        *("apply_custom_logit_processor", "sanitize_nan_logits"),
    },
    "sglang.srt.layers.sampler:Sampler.forward": {
        *("_preprocess_logits", "_trace_e2e_sampler", "maybe_detect_nan", "tuple", "empty"),
        *("argmax", "_aiter_greedy_sample", "_forward_ascend_backend", "sampler_softmax"),
        *("softmax", "log_softmax", "div", "div_", "bfloat16", "write_output_to"),
    },
    "sglang.srt.speculative.eagle_utils:eagle_sample": {
        *("sanitize_nan_logits", "add_", "apply_scaling_penalties", "apply", "clone", "argmax"),
        *("force_speculative", "force_speculative_from_tree", "sample_uno_tree_target_tokens"),
        *("sampling_softmax", "reshape", "list"),
    },
}
"""The names of what each step from logits to a token calls with the logits."""


of_the_newest = pytest.mark.skipif(
    versions.installed() != versions.NEWEST, reason="the lists are those of the newest SGLang"
)


@of_the_newest
def test_fields_of_a_batch() -> None:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    names = {field.name for field in dataclasses.fields(SamplingBatchInfo)}
    assert names == CHANGES.keys() | SAMPLES | REPORTS


@of_the_newest
def test_parameters_of_a_request() -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    assert set(SamplingParams.__struct_fields__) == PARAMETERS


@of_the_newest
def test_penalizers() -> None:
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.penaltylib.orchestrator import _BatchedPenalizer
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    names = {"Frequency", "MinNewTokens", "Presence", "Repetition"}
    present = {kind.__name__ for kind in _BatchedPenalizer.__subclasses__()}
    assert present == {f"Batched{name}Penalizer" for name in names}
    assert set(penaltylib.__all__) == present | {"BatchedPenalizerOrchestrator"}
    tree = ast.parse(textwrap.dedent(inspect.getsource(SamplingBatchInfo.from_schedule_batch)))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.endswith("Penalizer")} == present


@of_the_newest
@pytest.mark.parametrize("target", STEPS)
def test_steps_from_logits_to_a_token(target: str) -> None:
    assert _calls_with_logits(target) == STEPS[target]


def _calls_with_logits(target: str) -> set[str]:
    """Return the names of what a function calls with logits, or on them."""
    import importlib

    module, _, path = target.partition(":")
    function: Any = importlib.import_module(module)
    for name in path.split("."):
        function = getattr(function, name)
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            parts = [*receiver, *node.args, *(keyword.value for keyword in node.keywords)]
            if any("logits" in ast.unparse(part) for part in parts):
                called = node.func
                is_method = isinstance(called, ast.Attribute)
                names.add(called.attr if is_method else ast.unparse(called))  # type: ignore[attr-defined]
    return names


# ---- all of them at once -------------------------------------------------------------------------

WIDTH, VOCAB = 3, 20


class Mask:
    """A grammar mask that excludes token 4."""

    def apply(self, scores: torch.Tensor) -> None:
        scores[:, 4] = -torch.inf


def batch_info(processor: Callable[..., torch.Tensor]) -> Any:
    """Return the sampling information of two requests, of which the second has a processor."""
    from sglang.srt.sampling import sampling_batch_info
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    ones = torch.ones(2)
    kind: Any = getattr(sampling_batch_info, "ProcessorEntry", None)
    entry: Any = processor, torch.tensor([False, True])  # in older shapes
    if kind is not None:
        entry = kind(processor, rows=[1], indices=torch.tensor([1]))
    newer = {"is_any_greedy"} & SamplingBatchInfo.__dataclass_fields__.keys()
    additive, bias, scaling = torch.zeros(2, VOCAB), torch.zeros(2, VOCAB), torch.ones(2, VOCAB)
    additive[:, 1], scaling[:, 2], bias[:, 3] = -5.0, 2.0, 7.0
    return SamplingBatchInfo(
        *(ones.view(-1, 1), ones, ones.int(), ones),
        is_all_greedy=True,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=VOCAB,
        acc_additive_penalties=additive,
        acc_scaling_penalties=scaling,
        logit_bias=bias,
        has_custom_logit_processor=True,
        custom_params=[None, {"token": 6}],
        custom_logit_processor={1: entry},
        device="cpu",
        **dict.fromkeys(newer, True),
    )


def test_a_processor_sees_the_row_of_plain_decoding() -> None:
    torch.manual_seed(0)
    received: list[torch.Tensor] = []

    def processor(scores: torch.Tensor, parameters: list[dict[str, int]]) -> torch.Tensor:
        received.append(scores.clone())
        scores[:, parameters[0]["token"]] = 100.0
        return scores

    info, rows = batch_info(processor), torch.randn(2 * WIDTH, VOCAB)
    expected, width = rows.clone(), WIDTH
    expected[:, 1] -= 5.0
    expected[:, 2] = torch.where(expected[:, 2] < 0, expected[:, 2] * 2, expected[:, 2] / 2)
    expected[:, 3] += 7.0
    expected[:, 4] = -torch.inf
    mask: Any = Mask()
    logits.apply_all(rows, width, info, mask)
    assert len(received) == 1
    assert torch.equal(received[0], expected[[width]])
    expected[width, 6] = 100.0
    assert torch.equal(rows, expected)
    assert info.acc_additive_penalties is info.acc_scaling_penalties is info.logit_bias is None


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_batch_without_changes_is_left_alone(on_cpu: bool) -> None:
    from patches.eagle_utils import _change_logits

    info = SimpleNamespace(has_custom_logit_processor=False, acc_additive_penalties=None)
    mask, batch, nothing = object(), SimpleNamespace(sampling_info=info), SimpleNamespace()
    arguments: Any = (nothing, batch, nothing, mask, on_cpu)
    assert not _change_logits(*arguments)
