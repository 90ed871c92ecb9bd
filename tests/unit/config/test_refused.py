"""Every combination that is refused at the start: its sentence, its devices, and what it leaves."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.config import sglang_flags
from tlt_sglang.config.refusals import require_started, require_use
from tlt_sglang.config.refused import DRAFTERS, FLAGS, refuse_drafter, refuse_flags
from tlt_sglang.config.settings import Config, Device
from tlt_sglang.config.sglang_arguments import check_resolved, native_fields
from tlt_sglang.config.sglang_flags import Flags
from tlt_sglang.errors import ConfigError
from tlt_sglang.launcher import environment
from tlt_sglang.strategy.strategies import parse

POOL = Config(("off", "eagle3:3x1x4"))
CHAINS = Config(("eagle3:3x1x4", "eagle3:5x1x6"))
STORE = Config(("eagle3:3x1x4",), store="s")
SAMPLING = Config(("eagle3:3x1x4",), sampling="coupled")
PLAIN = Config(("eagle3:3x1x4",))

WITH_POOL = "does not work with --tlt-strategies off,eagle3:3x1x4:"
WITH_CHAINS = "does not work with --tlt-strategies eagle3:3x1x4,eagle3:5x1x6:"
WITH_STORE = "does not work with --tlt-store s:"
WITH_SAMPLING = "does not work with --tlt-sampling coupled:"
ONE = "or name one strategy in --tlt-strategies."
NO_STORE = "or leave --tlt-store out."
DRAWN = "tokens are sampled by the noise of a seed, which gives the same answer with any strategy"
LOSSY = "it accepts drafts that the target would not have sampled"
GROUPS = "each group of ranks would choose and log for its own batch"
WORKER = "SGLang then runs a worker of its own, which TLT does not know"
LORA = "the CUDA graphs of one strategy would take the LoRA buffers of another"
STAGES = "only the last stage would have a drafter"
SERVERS = "neither server has all that a request leaves for its drafter"

ON_A_GPU: tuple[tuple[str, Config, str], ...] = (
    (
        "--attn-dp-size 2",
        CHAINS,
        f"--attn-dp-size 2 {WITH_CHAINS} {GROUPS}; use --attn-dp-size 1, {ONE}",
    ),
    (
        "--attn-dp-size 2",
        STORE,
        f"--attn-dp-size 2 {WITH_STORE} {GROUPS}; use --attn-dp-size 1, {NO_STORE}",
    ),
    (
        "--enable-dp-attention",
        POOL,
        f"--enable-dp-attention {WITH_POOL} {GROUPS}; leave --enable-dp-attention out, {ONE}",
    ),
    ("--pp-size 2", CHAINS, f"--pp-size 2 {WITH_CHAINS} {STAGES}; use --pp-size 1, {ONE}"),
    ("--pp-size 2", STORE, f"--pp-size 2 {WITH_STORE} {STAGES}; use --pp-size 1, {NO_STORE}"),
    (
        "--pp-size 2",
        SAMPLING,
        f"--pp-size 2 {WITH_SAMPLING} {STAGES}; use --pp-size 1, or use --tlt-sampling target.",
    ),
    (
        "--rl-on-policy-target fsdp",
        SAMPLING,
        f"--rl-on-policy-target fsdp {WITH_SAMPLING} SGLang then rounds log-probabilities before "
        "it samples, and verification would not; leave --rl-on-policy-target out, or use "
        "--tlt-sampling target.",
    ),
    (
        "--enable-two-batch-overlap",
        CHAINS,
        f"--enable-two-batch-overlap {WITH_CHAINS} a change of strategy would replace the "
        f"attention backend that splits the batch; leave --enable-two-batch-overlap out, {ONE}",
    ),
    (
        "--enable-pdmux",
        CHAINS,
        f"--enable-pdmux {WITH_CHAINS} a change of strategy would not reach the attention backends "
        f"of its streams; leave --enable-pdmux out, {ONE}",
    ),
    (
        "--enable-multi-layer-eagle",
        CHAINS,
        f"--enable-multi-layer-eagle {WITH_CHAINS} {WORKER}; leave --enable-multi-layer-eagle out, "
        f"{ONE}",
    ),
    (
        "--enable-multi-layer-eagle",
        STORE,
        f"--enable-multi-layer-eagle {WITH_STORE} {WORKER}; leave --enable-multi-layer-eagle out, "
        f"{NO_STORE}",
    ),
    (
        "--enable-lora",
        CHAINS,
        f"--enable-lora {WITH_CHAINS} {LORA}; leave --enable-lora out, {ONE}",
    ),
    (
        "--lora-paths adapter",
        CHAINS,
        f"--lora-paths adapter {WITH_CHAINS} {LORA}; leave --lora-paths out, {ONE}",
    ),
    (
        "--speculative-draft-model-quantization fp8",
        STORE,
        f"--speculative-draft-model-quantization fp8 {WITH_STORE} published versions are not "
        "quantised, and a drafter takes --quantization from the target; use "
        f"--speculative-draft-model-quantization unquant, {NO_STORE}",
    ),
    (
        "--enable-mixed-chunk",
        POOL,
        f"--enable-mixed-chunk {WITH_POOL} requests that decode beside a prompt would leave gaps "
        "in the drafter's KV cache; leave --enable-mixed-chunk out, or leave off and ngram out of "
        "--tlt-strategies.",
    ),
    (
        "--disaggregation-mode decode",
        CHAINS,
        f"--disaggregation-mode decode {WITH_CHAINS} {SERVERS}; leave --disaggregation-mode out, "
        f"{ONE}",
    ),
    (
        "--disaggregation-mode prefill",
        SAMPLING,
        f"--disaggregation-mode prefill {WITH_SAMPLING} {SERVERS}; leave --disaggregation-mode "
        "out, or use --tlt-sampling target.",
    ),
)

EVERYWHERE: tuple[tuple[str, Config, str], ...] = (
    tuple(
        (
            f"{flag} 0.9",
            Config(("off",)),
            f"{flag} 0.9 does not work with TLT: {LOSSY}; use {flag} 1.",
        )
        for flag in ("--speculative-accept-threshold-single", "--speculative-accept-threshold-acc")
    )
    + tuple(
        (flag, Config(("off",)), f"{flag} does not work with TLT: {DRAWN}; leave {flag} out.")
        for flag in ("--speculative-use-rejection-sampling", "--speculative-use-block-verification")
    )
    + (
        (
            "--tokenizer-worker-num 2",
            Config(("off",), client_timeout_s=60.0),
            "--tokenizer-worker-num 2 does not work with --tlt-client-timeout-s 60: a worker that "
            "a client does not call would take it for silent; use --tokenizer-worker-num 1, or "
            "leave --tlt-client-timeout-s out.",
        ),
    )
)

RESOLVED: tuple[tuple[dict[str, Any], Config, str], ...] = (
    (
        {"speculative_algorithm": "FROZEN_KV_MTP"},
        CHAINS,
        f"--speculative-algorithm FROZEN_KV_MTP {WITH_CHAINS} {WORKER}; use an EAGLE or EAGLE-3 "
        f"drafter, {ONE}",
    ),
    (
        {"speculative_algorithm": "STANDALONE"},
        Config(store="s"),
        f"--speculative-algorithm STANDALONE {WITH_STORE} {WORKER}; use an EAGLE or EAGLE-3 "
        f"drafter, {NO_STORE}",
    ),
    (
        {"enable_multi_layer_eagle": True},
        CHAINS,
        f"--enable-multi-layer-eagle {WITH_CHAINS} {WORKER}; leave --enable-multi-layer-eagle out, "
        f"{ONE}",
    ),
    (
        {"speculative_draft_model_quantization": "fp8"},
        STORE,
        f"--speculative-draft-model-quantization fp8 {WITH_STORE} published versions are not "
        "quantised, and a drafter takes --quantization from the target; use "
        f"--speculative-draft-model-quantization unquant, {NO_STORE}",
    ),
)

EAGLE3 = {"architectures": ["LlamaForCausalLMEagle3"]}
LAYERS = "eagle_aux_hidden_state_layer_ids"

OF_DRAFTERS: tuple[tuple[dict[str, Any], Config, str], ...] = (
    (
        {"architectures": ["DeepseekV3ForCausalLMNextN"]},
        POOL,
        f"The drafter DeepseekV3ForCausalLMNextN {WITH_POOL} prediction heads can neither wait for "
        "other strategies nor be trained; use an EAGLE or EAGLE-3 drafter, or leave off and ngram "
        "out of --tlt-strategies.",
    ),
    (
        {"architectures": ["Qwen3NextForCausalLMMTP"]},
        STORE,
        f"The drafter Qwen3NextForCausalLMMTP {WITH_STORE} prediction heads can neither wait for "
        f"other strategies nor be trained; use an EAGLE or EAGLE-3 drafter, {NO_STORE}",
    ),
    (
        EAGLE3 | {"rope_scaling": {"mrope_section": [16, 24, 24]}},
        POOL,
        f"A drafter with multimodal positions (mrope_section) {WITH_POOL} positions of images are "
        "not kept while the drafter waits for other strategies; use another "
        "--speculative-draft-model-path, or leave off and ngram out of --tlt-strategies.",
    ),
)

OF_DRAFTERS_EVERYWHERE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"num_aux_hidden_states": 5}, "A drafter that reads 5 layers of its target"),
    ({"eagle_config": {LAYERS: [1, 2]}}, "A drafter that reads 2 layers of its target"),
    ({LAYERS: [4]}, "A drafter that reads 1 layer of its target"),
    (
        {"eagle_config": {"use_aux_hidden_state": False}},
        "A drafter that reads 1 layer of its target",
    ),
)


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    return str(error.value)


# -- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "config", "sentence"), ON_A_GPU)
def test_flags_on_a_gpu(words: str, config: Config, sentence: str) -> None:
    args = sglang_flags.read(["--model-path", "some/model", *words.split()])
    args.speculative_draft_model_path = "some/drafter"
    assert message(native_fields, config, args, "cuda") == sentence
    refuse_flags(config, args, "cpu")
    refuse_flags(PLAIN, args, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("words", "config", "sentence"), EVERYWHERE)
def test_flags_everywhere(words: str, config: Config, sentence: str, device: Device) -> None:
    args = sglang_flags.read(["--model-path", "some/model", *words.split()])
    assert message(native_fields, config, args, device) == sentence


@pytest.mark.parametrize(("values", "config", "sentence"), RESOLVED)
def test_what_sglang_sets_itself(values: dict[str, Any], config: Config, sentence: str) -> None:
    envelope = config.strategy
    fields: dict[str, Any] = {"speculative_algorithm": "EAGLE3"}
    if envelope is not None:
        fields |= {
            "speculative_num_steps": envelope.num_steps,
            "speculative_eagle_topk": envelope.topk,
            "speculative_num_draft_tokens": envelope.num_draft_tokens,
        }
    assert message(check_resolved, config, Flags("m", **(fields | values)), "cuda") == sentence


def test_tlt_check_lists_them() -> None:
    notes = [result.text for result in environment.check("cuda") if not result.required]
    assert any(
        note.startswith("With several strategies, an engine refuses --attn-dp-size other than 1, ")
        and note.endswith(" (docs/refused.md).")
        for note in notes
    )
    assert sum("an engine refuses" in note for note in notes) == 6
    on_cpu = [result.text for result in environment.check("cpu")]
    assert sum("an engine refuses" in note for note in on_cpu) == 3


def test_mixed_chunks_are_served_where_the_drafter_never_waits() -> None:
    refuse_flags(CHAINS, Flags(enable_mixed_chunk=True), "cuda")


def test_every_row_is_tested() -> None:
    words = {case[0].split()[0] for case in (*ON_A_GPU, *EVERYWHERE)} | {"--speculative-algorithm"}
    assert {row.title.split("`")[1] for row in FLAGS} == words
    assert len(DRAFTERS) == 4


@pytest.mark.sglang
@pytest.mark.parametrize("words", sorted({case[0] for case in (*ON_A_GPU, *EVERYWHERE)}))
def test_sglang_reads_these_flags_as_the_launcher_does(words: str) -> None:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    field = words.split()[0].removeprefix("--").replace("-", "_")
    before, after = (
        getattr(parser.parse_args(["--model-path", "m", *flags]), field)
        for flags in ([], words.split())
    )
    refuse_flags(POOL, Flags(**{field: before or getattr(Flags(), field)}), "cuda")
    read = getattr(sglang_flags.read(words.split()), field)
    assert read == (after[0] if isinstance(after, list) else after) != before


RESOLVE = """
import json, sys
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import ServerArgs
from tlt_sglang.config.refused import FLAGS

for words in json.loads(sys.argv[1]):
    args = ServerArgs(device="cpu", speculative_algorithm="NEXTN", **words)
    args.resolve_once()
    things = [row.detect(resolved_view(args)) for row in FLAGS]
    print(json.dumps([thing for thing in things if thing is not None]))
"""


@pytest.mark.sglang
def test_what_sglang_resolves_is_refused_by_the_same_rows(tmp_path: Path) -> None:
    """Nothing is refused by default; a drafter inherits the quantisation of its target."""
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (tmp_path / "config.json").write_text(json.dumps(model))
    (drafter / "config.json").write_text(json.dumps(model | EAGLE3))
    common: dict[str, object] = {
        "model_path": str(tmp_path),
        "speculative_draft_model_path": str(drafter),
        "speculative_num_steps": 3,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 4,
        "skip_tokenizer_init": True,
        "attention_backend": "torch_native",
    }
    quantised = common | {"quantization": "w8a8_int8"}
    cases: tuple[dict[str, object], ...] = (
        common,
        quantised,
        quantised | {"speculative_draft_model_quantization": "unquant"},
        common | {"enable_dp_attention": True, "dp_size": 2, "tp_size": 2},
    )
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(cases)],
        env=os.environ | {"TLT_CONFIG": "", "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert lines == [
        [],
        ["--speculative-draft-model-quantization w8a8_int8"],
        [],
        ["--attn-dp-size 2"],
    ]


# -- drafters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drafter", "config", "sentence"), OF_DRAFTERS)
def test_drafters_on_a_gpu(drafter: dict[str, Any], config: Config, sentence: str) -> None:
    assert message(refuse_drafter, config, drafter, "cuda") == sentence
    refuse_drafter(config, drafter, "cpu")
    refuse_drafter(PLAIN, drafter, "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("fields", "thing"), OF_DRAFTERS_EVERYWHERE)
def test_drafters_of_other_layers(fields: dict[str, Any], thing: str, device: Device) -> None:
    assert message(refuse_drafter, STORE, EAGLE3 | fields, device) == (
        f"{thing} {WITH_STORE} hidden states are logged and trained for three layers; use another "
        f"--speculative-draft-model-path, {NO_STORE}"
    )
    refuse_drafter(POOL, EAGLE3 | fields, device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quantised_drafter(device: Device) -> None:
    drafter = EAGLE3 | {"quantization_config": {"quant_method": "fp8"}}
    assert message(refuse_drafter, STORE, drafter, device) == (
        f"A quantised drafter {WITH_STORE} published versions are not quantised; use another "
        f"--speculative-draft-model-path, {NO_STORE}"
    )
    refuse_drafter(POOL, drafter, device)


@pytest.mark.parametrize(
    "drafter",
    [
        EAGLE3,
        EAGLE3 | {"num_aux_hidden_states": 3},
        EAGLE3 | {"eagle_config": {LAYERS: [1, 8, 16]}},
        {"architectures": ["LlamaForCausalLMEagle"], "num_aux_hidden_states": 5},
        {"rope_scaling": {"rope_type": "yarn"}, "eagle_config": None},
        {},
    ],
)
def test_drafters_that_work(drafter: dict[str, Any]) -> None:
    refuse_drafter(dataclasses.replace(POOL, store="s"), drafter, "cuda")


def test_a_drafter_in_a_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    fields = EAGLE3 | {"num_aux_hidden_states": 2, "hidden_size": 64, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    args = Flags("some/model", speculative_draft_model_path=str(tmp_path))
    text = message(native_fields, STORE, args, "cuda")
    assert text.startswith("A drafter that reads 2 layers of its target")


# -- features that nothing would use, or that did not come up --------------------------------------


@pytest.mark.parametrize("names", [("off",), ("ngram:8",)])
def test_a_store_without_a_drafter(names: tuple[str, ...]) -> None:
    text = (
        f"--tlt-store s is of no use to {names[0]}, which has no drafter to train; add a strategy "
        "such as eagle3:3x1x4, or leave --tlt-store out."
    )
    assert message(native_fields, Config(names, store="s"), Flags("some/model"), "cpu") == text
    assert message(require_use, Config(store="s"), parse(names[0])) == text


@pytest.mark.parametrize("config", [POOL, STORE, SAMPLING, Config(store="s"), Config()])
def test_features_that_are_used(config: Config) -> None:
    require_use(config, None)


@pytest.mark.parametrize(
    ("config", "name", "feature", "remedy"),
    [
        (
            POOL,
            "pool",
            "--tlt-strategies off,eagle3:3x1x4",
            "name one strategy in --tlt-strategies",
        ),
        (STORE, "store", "--tlt-store s", "leave --tlt-store out"),
        (SAMPLING, "sampling", "--tlt-sampling coupled", "use --tlt-sampling target"),
    ],
)
def test_a_feature_that_did_not_come_up(
    config: Config, name: str, feature: str, remedy: str
) -> None:
    assert message(require_started, config, (name,), "by NGRAMWorker") == (
        f"{feature} did not come up, as SGLang serves this model by NGRAMWorker; {remedy}."
    )
    require_started(PLAIN, ("pool", "store", "sampling"), "by NGRAMWorker")
