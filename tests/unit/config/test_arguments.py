"""Translate a configuration into SGLang's arguments: every default, every refusal."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import psutil
import pytest

from tlt_sglang.config.settings import Config, Device
from tlt_sglang.config.sglang_arguments import (
    check_resolved,
    choose,
    default_pool,
    native_fields,
    settle,
    strategy_fields,
)
from tlt_sglang.config.sglang_flags import Flags
from tlt_sglang.cpu import memory, ranks
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import Strategy, parse

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 100,
}
BYTES_PER_TOKEN = 4 * 2 * 2 * 16 * 4
GIB = 2**30
HUB = "some/model"


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GiB are free."""
    answer = SimpleNamespace(available=8 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: answer)


def save(folder: Path, **config: Any) -> str:
    """A model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODEL | config))
    return str(folder)


def save_drafter(folder: Path, kind: str = "eagle", **config: Any) -> str:
    name = {"eagle": "LlamaForCausalLMEagle", "eagle3": "LlamaForCausalLMEagle3"}[kind]
    return save(folder, architectures=[name], **config)


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    return str(error.value)


# ---- which strategy ------------------------------------------------------------------------------


def test_without_a_drafter_n_grams() -> None:
    assert choose(Config(), Flags(HUB)) == Strategy("ngram", num_draft_tokens=8)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_with_a_drafter_a_chain_of_its_kind(tmp_path: Path, kind: str) -> None:
    args = Flags(save(tmp_path / "m"))
    args.speculative_draft_model_path = save_drafter(tmp_path / "d", kind)
    assert str(choose(Config(), args)) == f"{kind}:3x1x4"


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_with_a_drafter_and_no_word_on_strategies_there_are_several(
    tmp_path: Path, kind: str
) -> None:
    args = Flags(save(tmp_path / "m"))
    assert default_pool(args) == ()
    args.speculative_draft_model_path = save_drafter(tmp_path / "d", kind)
    pool = Config(default_pool(args)).pool
    assert {arm.drafter for arm in pool} == {"off", "ngram", kind}
    native_fields(Config(default_pool(args)), args, "cpu")
    args.speculative_num_steps = 2
    assert default_pool(args) == ()
    hub = Flags(HUB, speculative_draft_model_path="some/drafter")
    assert default_pool(hub) == ()


@pytest.mark.parametrize(("device", "elsewhere"), [("cpu", "coupled"), ("cuda", "target")])
def test_sampling_is_settled(tmp_path: Path, device: Device, elsewhere: str) -> None:
    args = Flags(save(tmp_path / "m"))
    assert settle(Config(), args, device).sampling == "coupled"
    assert settle(Config(sampling="target"), args, device).sampling == "target"
    args.pp_size = 2
    assert settle(Config(), args, device).sampling == elsewhere


def test_the_default_pool_is_the_same_on_both_devices(tmp_path: Path) -> None:
    args = Flags(save(tmp_path / "m"))
    args.speculative_draft_model_path = save_drafter(tmp_path / "d")
    pool = ("off", "eagle:1x1x2", "eagle:3x1x4", "eagle:3x4x8", "ngram:8")
    for device in get_args(Device):
        settled = settle(Config(store="s"), args, device)
        assert settled.strategies == pool
        native_fields(settled, args, device)


def test_plain_decoding_of_a_pool_has_more_requests_than_sglang_speculates_for() -> None:
    args = Flags(HUB, speculative_draft_model_path="some/drafter")
    both, chains = Config(("off", "eagle:3x1x4")), Config(("eagle:3x1x4", "eagle:5x1x6"))
    assert native_fields(both, args, "cuda")["max_running_requests"] == 256
    assert "max_running_requests" not in native_fields(chains, args, "cuda")
    args.max_running_requests = 32
    assert "max_running_requests" not in native_fields(both, args, "cuda")


@pytest.mark.parametrize(
    ("strategies", "values", "backend"),
    [
        ("off,eagle3:3x4x8", {}, "triton"),
        ("off,eagle3:3x4x8", {"attention_backend": "fa3"}, None),
        ("off,eagle3:3x1x4", {}, None),
        ("eagle3:3x4x8", {}, None),
    ],
)
def test_pools_with_trees_do_not_wait_for_lengths(
    tmp_path: Path, strategies: str, values: dict[str, Any], backend: str | None
) -> None:
    """SGLang's own choice, FlashInfer, waits for them in each step."""
    for more, expected in (({}, backend), ({"kv_lora_rank": 512}, None)):
        args = Flags(save(tmp_path / f"{len(more)}", **more), **values)
        args.speculative_draft_model_path = save_drafter(tmp_path / "d", "eagle3")
        fields = native_fields(Config(tuple(strategies.split(","))), args, "cuda")
        assert fields.get("attention_backend") == expected


def test_a_drafter_keeps_its_weights_while_memory_is_released() -> None:
    args = Flags(HUB, speculative_draft_model_path="some/drafter")
    backup = "enable_draft_weights_cpu_backup"
    chain = Config(("eagle:3x1x4",))
    assert backup not in native_fields(chain, args, "cuda")
    args.enable_memory_saver = True
    assert native_fields(chain, args, "cuda")[backup] is True
    assert backup not in native_fields(Config(("ngram:8",)), args, "cuda")


def test_a_drafter_on_the_hub_is_taken_for_eagle() -> None:
    args = Flags(HUB, speculative_draft_model_path="some/drafter")
    assert str(choose(Config(), args)) == "eagle:3x1x4"


def test_sglangs_own_flags_are_left_alone(tmp_path: Path) -> None:
    args = Flags(HUB, speculative_algorithm="EAGLE", speculative_num_steps=2)
    assert choose(Config(), args) is None
    assert native_fields(Config(), args, "cuda") == {}


@pytest.mark.parametrize("text", ["off", "ngram:4"])
def test_the_strategy_asked_for(text: str) -> None:
    assert choose(Config((text,)), Flags(HUB)) == parse(text)


@pytest.mark.parametrize("text", ["eagle:3x1x4", "eagle3:3x4x8"])
def test_a_strategy_without_its_drafter(text: str) -> None:
    assert message(choose, Config((text,)), Flags(HUB)) == (
        f"Strategy {text} needs a drafter: give --speculative-draft-model-path, or use ngram:8."
    )


@pytest.mark.parametrize(("text", "kind"), [("eagle:3x4x8", "eagle3"), ("eagle3:2x1x3", "eagle")])
def test_a_strategy_for_the_other_kind_of_drafter(tmp_path: Path, text: str, kind: str) -> None:
    path = save_drafter(tmp_path / "d", kind)
    args = Flags(save(tmp_path / "m"), speculative_draft_model_path=path)
    assert message(choose, Config((text,)), args) == (
        f"Strategy {text} does not fit the drafter {path!r}, which is {kind}; write "
        f"{kind}:{text.partition(':')[2]}."
    )


@pytest.mark.parametrize("config", [Config(), Config(("off",)), Config(("ngram:8",))])
def test_a_drafter_is_looked_at_whatever_the_strategy(tmp_path: Path, config: Config) -> None:
    args = Flags(save(tmp_path / "m"))
    args.speculative_draft_model_path = str(tmp_path / "none")
    assert "does not exist" in message(choose, config, args)
    args.speculative_draft_model_path = save_drafter(tmp_path / "d", hidden_size=32)
    assert "is for another target: its hidden size is 32" in message(choose, config, args)
    args.speculative_draft_model_path = save_drafter(tmp_path / "d", vocab_size=99)
    assert "is for another target: its vocabulary is 99" in message(choose, config, args)
    args.speculative_draft_model_path = save(tmp_path / "m2")
    assert "is not a drafter" in message(choose, config, args)


# ---- its fields ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("off", {}),
        ("ngram:6", {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 6}),
        (
            "eagle:3x4x8",
            {
                "speculative_algorithm": "EAGLE",
                "speculative_num_steps": 3,
                "speculative_eagle_topk": 4,
                "speculative_num_draft_tokens": 8,
            },
        ),
        (
            "eagle3:2x1x3",
            {
                "speculative_algorithm": "EAGLE3",
                "speculative_num_steps": 2,
                "speculative_eagle_topk": 1,
                "speculative_num_draft_tokens": 3,
            },
        ),
    ],
)
def test_fields_of_a_strategy(text: str, fields: dict[str, Any]) -> None:
    assert strategy_fields(parse(text), Flags(HUB)) == fields


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("eagle:3x4x8", {"speculative_algorithm": "eagle"}),
        ("eagle:3x4x8", {"speculative_algorithm": "NEXTN"}),
        ("eagle:3x4x8", {"speculative_num_steps": 3, "speculative_eagle_topk": 4}),
        ("ngram:8", {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 8}),
    ],
)
def test_saying_the_same_twice_is_fine(text: str, values: dict[str, Any]) -> None:
    strategy = parse(text)
    assert strategy_fields(strategy, Flags(HUB, **values)) == strategy_fields(strategy, Flags(HUB))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("off", "speculative_algorithm", "NGRAM"),
        ("ngram:8", "speculative_algorithm", "EAGLE"),
        ("ngram:8", "speculative_num_draft_tokens", 16),
        ("eagle:3x1x4", "speculative_algorithm", "EAGLE3"),
        ("eagle3:3x1x4", "speculative_algorithm", "NEXTN"),
        ("eagle:3x1x4", "speculative_num_steps", 2),
        ("eagle:3x1x4", "speculative_eagle_topk", 4),
        ("eagle:3x1x4", "speculative_num_draft_tokens", 8),
    ],
)
def test_contradictions(text: str, name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    assert message(strategy_fields, parse(text), Flags(HUB, **{name: value})) == (
        f"{flag} {value} contradicts the strategy {text}; leave {flag} out."
    )


@pytest.mark.parametrize("text", ["off", "ngram:8"])
def test_a_drafter_that_the_strategy_does_not_use_is_not_loaded(text: str) -> None:
    args = Flags(HUB, speculative_draft_model_path="some/drafter")
    assert strategy_fields(parse(text), args)["speculative_draft_model_path"] is None


@pytest.mark.parametrize("algorithm", [None, "EAGLE"])
def test_two_adaptive_policies(algorithm: str | None) -> None:
    args = Flags(HUB, speculative_adaptive=True, speculative_algorithm=algorithm)
    assert message(native_fields, Config(), args, "cuda") == (
        "--speculative-adaptive is SGLang's own policy and contradicts --adaptive-spec; leave one "
        "of the two out."
    )


# ---- the CPU engine ------------------------------------------------------------------------------


def test_defaults_on_cpu(tmp_path: Path) -> None:
    assert native_fields(Config(), Flags(save(tmp_path)), "cpu") == {
        "speculative_algorithm": "NGRAM",
        "speculative_num_draft_tokens": 8,
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "sleep_on_idle": True,
        "max_running_requests": 16,
        "speculative_ngram_capacity": 1_000_000,
        "max_total_tokens": memory.MAX_TOKENS,
        "mem_fraction_static": 0.95,
    }


def test_on_a_gpu_only_the_strategy_is_set(tmp_path: Path) -> None:
    args = Flags(save(tmp_path), tp_size=2, page_size=16, dtype="bfloat16")
    fields = native_fields(Config(("ngram:8",)), args, "cuda")
    assert fields == {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 8}


def test_the_users_limits_are_kept(tmp_path: Path) -> None:
    args = Flags(save(tmp_path), max_total_tokens=500, max_running_requests=3)
    args.speculative_ngram_capacity = 5_000
    args.mem_fraction_static = 0.5
    fields = native_fields(Config(), args, "cpu")
    assert fields["max_total_tokens"] == 500
    assert "max_running_requests" not in fields
    assert "speculative_ngram_capacity" not in fields
    assert "mem_fraction_static" not in fields


@pytest.mark.parametrize("dtype", ["auto", "float32", "float"])
@pytest.mark.parametrize("backend", [None, "torch_native", "intel_amx"])
def test_what_the_cpu_takes(tmp_path: Path, dtype: str, backend: str | None) -> None:
    args = Flags(save(tmp_path), dtype=dtype, attention_backend=backend, page_size=1)
    assert native_fields(Config(), args, "cpu")["attention_backend"] == "torch_native"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"tp_size": 3},
            "--tp-size 3 needs a core for each rank and there are 2; lower it.",
        ),
        (
            {"dp_size": 2},
            "--dp-size 2 is not served on CPU; start with --dp-size 1, and one server for each "
            "replica.",
        ),
        (
            {"pp_size": 3},
            "--pp-size 3 is not served on CPU; start with --pp-size 1, and one server for each "
            "replica.",
        ),
        (
            {"kv_cache_dtype": "fp8_e4m3"},
            "--kv-cache-dtype fp8_e4m3 is not served on CPU; leave it out.",
        ),
        ({"quantization": "fp8"}, "--quantization fp8 is not served on CPU; leave it out."),
        (
            {"max_running_requests": 0},
            "--max-running-requests 0 is not valid; give at least 1.",
        ),
        ({"page_size": 16}, "--page-size 16 is not served on CPU; use 1."),
        ({"dtype": "bfloat16"}, "--dtype bfloat16 is not served on CPU; use float32."),
        ({"dtype": "half"}, "--dtype half is not served on CPU; use float32."),
        (
            {"attention_backend": "triton"},
            "--attention-backend triton does not run on CPU; leave it out.",
        ),
        ({"max_total_tokens": 0}, "--max-total-tokens 0 is too small; use at least 1."),
        ({"max_total_tokens": -5}, "--max-total-tokens -5 is too small; use at least 1."),
        (
            {"max_total_tokens": 10**11},
            "A KV cache of 100000000000 tokens needs 95367.4 GiB and 8.0 GiB of memory are free; "
            f"lower --max-total-tokens to at most {8 * GIB // BYTES_PER_TOKEN}.",
        ),
    ],
)
def test_what_the_cpu_refuses(
    tmp_path: Path, values: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "cores", lambda: [0, 1])
    args = Flags(save(tmp_path), **values)
    assert message(native_fields, Config(("off",)), args, "cpu") == sentence


def test_ranks_that_do_not_divide_the_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "cores", lambda: list(range(8)))
    args = Flags(save(tmp_path, num_attention_heads=9, num_key_value_heads=3), tp_size=2)
    assert message(native_fields, Config(("off",)), args, "cpu") == (
        "--tp-size 2 does not divide the model's num_attention_heads, 9; choose one that does."
    )
    args = Flags(save(tmp_path, intermediate_size=12), tp_size=2)
    assert native_fields(Config(("off",)), args, "cpu")


def test_cores_are_shared_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "cores", lambda: [2, 3, 5, 7, 11])
    monkeypatch.setenv(ranks.BIND, "")
    monkeypatch.delenv(ranks.BIND)
    ranks.share_cores(1)
    assert ranks.BIND not in os.environ
    ranks.share_cores(2)
    assert os.environ[ranks.BIND] == "2,3|5,7"
    ranks.share_cores(5)
    assert os.environ[ranks.BIND] == "2,3|5,7", "the user's own is kept"


def test_a_sliding_window_is_refused_on_cpu(tmp_path: Path) -> None:
    path = save(tmp_path, layer_types=["full_attention", "sliding_attention"])
    assert message(native_fields, Config(), Flags(path), "cpu") == (
        "Models with sliding-window attention are not served on CPU; use another model, or a GPU."
    )
    path = save(tmp_path, layer_types=["full_attention"] * 4)
    assert native_fields(Config(), Flags(path), "cpu")


def test_a_quantised_model_is_refused_on_cpu(tmp_path: Path) -> None:
    path = save(tmp_path, quantization_config={"quant_method": "fp8"})
    assert message(native_fields, Config(), Flags(path), "cpu") == (
        "Quantised models are not served on CPU; use another model, or a GPU."
    )
    assert native_fields(Config(), Flags(path), "cuda")


@pytest.mark.parametrize("odd", [1, "sliding", None, {}])
def test_odd_layer_types_are_left_to_sglang(tmp_path: Path, odd: Any) -> None:
    assert native_fields(Config(), Flags(save(tmp_path, layer_types=odd)), "cpu")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path, dtype="bfloat16")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5 * GIB)  # takes no room on the disk
    assert message(native_fields, Config(), Flags(path), "cpu") == (
        "The model's weights need 10.0 GiB in float32 and 8.0 GiB of memory are free; use a "
        "smaller model, or a GPU."
    )


def test_the_pool_gets_what_the_weights_leave(tmp_path: Path) -> None:
    path = save(tmp_path)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(7 * GIB)
    most = GIB // BYTES_PER_TOKEN
    fields = native_fields(Config(), Flags(path, max_total_tokens=most), "cpu")
    assert fields["max_total_tokens"] == most
    args = Flags(path, max_total_tokens=most + 1)
    assert f"at most {most}." in message(native_fields, Config(), args, "cpu")


def test_little_memory_makes_a_small_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = SimpleNamespace(available=4 * 100 * BYTES_PER_TOKEN)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: answer)
    fields = native_fields(Config(), Flags(save(tmp_path)), "cpu")
    assert fields["max_total_tokens"] == 100


def test_a_model_on_the_hub_gets_sglangs_pool() -> None:
    assert "max_total_tokens" not in native_fields(Config(), Flags(HUB), "cpu")


def test_a_model_with_other_names_gets_sglangs_pool(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 12, "n_head": 12}))
    assert "max_total_tokens" not in native_fields(Config(), Flags(str(tmp_path)), "cpu")


def test_the_language_model_of_several_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": MODEL}))
    fields = native_fields(Config(), Flags(str(tmp_path)), "cpu")
    assert fields["max_total_tokens"] == memory.MAX_TOKENS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", "four"),
        ("num_hidden_layers", None),
        ("num_hidden_layers", [4]),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", "4"),
        ("num_key_value_heads", 0),
        ("hidden_size", None),
        ("hidden_size", 64.0),
        ("head_dim", "wide"),
    ],
)
def test_odd_numbers_in_the_models_config(tmp_path: Path, name: str, value: Any) -> None:
    args = Flags(save(tmp_path, **{name: value}))
    assert message(native_fields, Config(), args, "cpu") == (
        f"{name} in the model's config.json is {value!r}; it must be an integer above 0."
    )


def test_more_heads_than_there_is_room_for(tmp_path: Path) -> None:
    args = Flags(save(tmp_path, hidden_size=2))
    assert message(native_fields, Config(), args, "cpu") == (
        "head_dim in the model's config.json is 0; it must be an integer above 0."
    )


# ---- arguments that were resolved too early ------------------------------------------------------


TOO_EARLY = (
    "SGLang's arguments were resolved before TLT was loaded (call sglang.srt.plugins.load_plugins "
    "first, or give SGLang the strategy's speculative_* arguments yourself)"
)


def test_resolved_without_a_strategy() -> None:
    text = message(check_resolved, Config(), Flags(HUB), "cuda")
    assert text == f"TLT_CONFIG is set, but {TOO_EARLY}."


@pytest.mark.parametrize(
    ("text", "values", "difference"),
    [
        ("ngram:8", {}, "speculative_algorithm is None in place of 'NGRAM'"),
        ("eagle:3x1x4", {}, "speculative_algorithm is None in place of 'EAGLE'"),
        (
            "ngram:8",
            {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 12},
            "speculative_num_draft_tokens is 12 in place of 8",
        ),
        (
            "off",
            {"speculative_algorithm": "NGRAM"},
            "speculative_algorithm is 'NGRAM' in place of None",
        ),
    ],
)
def test_resolved_with_another_strategy(text: str, values: dict[str, Any], difference: str) -> None:
    args = Flags(HUB, **values)
    assert message(check_resolved, Config((text,)), args, "cuda") == (
        f"TLT_CONFIG asks for {text}, but {TOO_EARLY}: {difference}."
    )


def test_resolved_without_a_strategy_where_none_is_wanted() -> None:
    check_resolved(Config(("off",)), Flags(HUB), "cpu")


def test_resolved_with_a_strategy() -> None:
    args = Flags(HUB, speculative_algorithm="NGRAM", speculative_num_draft_tokens=8)
    check_resolved(Config(), args, "cpu")
    check_resolved(Config(("ngram:8",)), args, "cpu")


def test_an_algorithm_that_sglang_made_of_eagle_is_left_alone() -> None:
    args = Flags(HUB, speculative_algorithm="FROZEN_KV_MTP", speculative_num_steps=5)
    check_resolved(Config(("eagle:3x1x4",)), args, "cuda")


def test_resolved_for_several_ranks_on_cpu() -> None:
    args = Flags(HUB, speculative_algorithm="NGRAM", tp_size=5000)
    assert "--tp-size 5000 needs a core" in message(check_resolved, Config(), args, "cpu")
    check_resolved(Config(), args, "cuda")


# -- limits of a strategy --------------------------------------------------------------------------

LIMITS: tuple[Any, ...] = (
    (
        ("eagle3:3x8x16",),
        {"draft_vocab_size": 6},
        {},
        Config(),
        "Strategy eagle3:3x8x16 keeps 8 branches, but the vocabulary of the drafter {drafter!r} "
        "has 6 tokens; lower TOPK.",
    ),
    (
        ("ngram:16",),
        {},
        {"max_total_tokens": 100, "max_running_requests": 8},
        Config(),
        "Strategy ngram:16 takes 128 KV slots in a step of 8 requests, but --max-total-tokens is "
        "100; raise it, or lower --max-running-requests.",
    ),
    (
        ("off", "eagle3:3x1x4"),
        {},
        {},
        Config(graph_memory_gb=0.0001),
        "--tlt-graph-memory-gb 0.0001 is not possible: plain decoding alone takes 0.10 GB of "
        "graphs, 0.00 GB are allowed; give more.",
    ),
)


@pytest.mark.parametrize(("strategies", "drafts", "values", "config", "sentence"), LIMITS)
def test_a_strategy_beyond_what_there_is(
    tmp_path: Path,
    strategies: tuple[str, ...],
    drafts: dict[str, Any],
    values: dict[str, Any],
    config: Config,
    sentence: str,
) -> None:
    drafter = save_drafter(tmp_path / "drafter", "eagle3", **drafts)
    model = save(tmp_path / "model", intermediate_size=128)
    args = Flags(model, speculative_draft_model_path=drafter, **values)
    config = dataclasses.replace(config, strategies=strategies)
    assert message(native_fields, config, args, "cuda") == sentence.format(drafter=drafter)
