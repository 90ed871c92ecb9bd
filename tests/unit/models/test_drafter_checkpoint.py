"""Checks of a checkpoint's config.json, and the drafters that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tlt_sglang.errors import ConfigError
from tlt_sglang.models.drafter_checkpoint import (
    check_fits,
    drafter_kind,
    float32_bytes,
    read_config,
    text_part,
)

TARGET = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 100}
EAGLE = {"architectures": ["LlamaForCausalLMEagle"], "hidden_size": 64, "vocab_size": 100}
EAGLE3 = EAGLE | {"architectures": ["LlamaForCausalLMEagle3"]}


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    return str(error.value)


# ---- reading -------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TARGET))
    assert read_config(str(tmp_path), "model") == TARGET


def test_a_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert read_config("~", "model") == {}


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.1-8B", "a/b", "org_1/model.v2"])
def test_a_hub_id_is_left_to_sglang(path: str) -> None:
    assert read_config(path, "model") is None


@pytest.mark.parametrize(
    "path",
    ["/no/such", "./no/such", "../no", "~/no/such", "no-such", "a/b/c", "a/", "a\0b/c", "a//b"],
)
def test_a_path_that_does_not_exist(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = f"The drafter {path!r} does not exist; use a folder or a hub id."
    assert message(read_config, path, "drafter") == expected


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path(path: str) -> None:
    expected = "The path of the model is empty; use a folder or a hub id."
    assert message(read_config, path, "model") == expected


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 5000, "File name too long"),
        ("~no-such-user/model", "Could not determine home directory"),
    ],
)
def test_a_path_that_cannot_be_read(path: str, reason: str) -> None:
    expected = f"The model {path!r} cannot be read ({reason}); use another folder."
    assert message(read_config, path, "model") == expected


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert message(read_config, str(tmp_path), "drafter") == (
        f"The drafter folder {str(tmp_path)!r} has no readable config.json; use a Hugging Face "
        "checkpoint folder."
    )


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert "has no readable config.json" in message(read_config, str(file), "model")


@pytest.mark.parametrize("content", ["[]", "1", "null", '"text"'])
def test_a_config_that_is_not_an_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    expected = f"config.json of the model {str(tmp_path)!r} is not a JSON object; repair the file."
    assert message(read_config, str(tmp_path), "model") == expected


def test_the_language_model_overrides_other_fields() -> None:
    config = {"hidden_size": 1, "vocab_size": 2, "text_config": {"hidden_size": 3}}
    assert text_part(config)["hidden_size"] == 3
    assert text_part(config)["vocab_size"] == 2
    assert text_part({"text_config": "odd"}) == {"text_config": "odd"}


# ---- the kind of drafter -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "kind"),
    [
        (["LlamaForCausalLMEagle"], "eagle"),
        (["Qwen2ForCausalLMEagle"], "eagle"),
        (["DeepseekV3ForCausalLMNextN"], "eagle"),
        (["LlamaForCausalLMEagle3"], "eagle3"),
        (["Other", "LlamaForCausalLMEagle3"], "eagle3"),
    ],
)
def test_the_kind(architectures: list[str], kind: str) -> None:
    assert drafter_kind({"architectures": architectures}, "d") == kind


@pytest.mark.parametrize(
    "architectures", [None, [], ["LlamaForCausalLM"], [None], [1], 1, "Eagle", {}]
)
def test_a_checkpoint_that_is_not_a_drafter(architectures: Any) -> None:
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    assert message(drafter_kind, {"architectures": architectures}, "d") == (
        f"'d' is not a drafter: its architectures are {names}; use an EAGLE or EAGLE-3 checkpoint."
    )


# ---- does it fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        (TARGET, EAGLE),
        (TARGET, EAGLE3),
        (TARGET, EAGLE | {"tie_word_embeddings": False}),
        (TARGET, EAGLE3 | {"draft_vocab_size": 32}),
        (TARGET, EAGLE3 | {"hidden_size": 32, "target_hidden_size": 64}),
        (TARGET, EAGLE3 | {"tie_word_embeddings": True}),
        ({"text_config": TARGET}, EAGLE),
        ({}, EAGLE),  # nothing to compare with
    ],
)
def test_it_fits(target: dict[str, Any], drafter: dict[str, Any]) -> None:
    check_fits(target, drafter, "d")


@pytest.mark.parametrize(
    ("target", "drafter", "name", "actual", "expected"),
    [
        (TARGET, EAGLE | {"hidden_size": 32}, "hidden size", 32, 64),
        (TARGET, EAGLE | {"hidden_size": None}, "hidden size", None, 64),
        (TARGET, EAGLE | {"target_hidden_size": 64, "hidden_size": 32}, "hidden size", 32, 64),
        (TARGET, EAGLE3 | {"hidden_size": 32}, "hidden size", 32, 64),
        (TARGET, EAGLE3 | {"target_hidden_size": 32}, "hidden size", 32, 64),
        (TARGET, EAGLE | {"vocab_size": 99}, "vocabulary", 99, 100),
        (TARGET, EAGLE3 | {"vocab_size": 32}, "vocabulary", 32, 100),
        ({"text_config": TARGET}, EAGLE | {"vocab_size": 99}, "vocabulary", 99, 100),
    ],
)
def test_a_drafter_of_another_target(
    target: dict[str, Any], drafter: dict[str, Any], name: str, actual: Any, expected: Any
) -> None:
    assert message(check_fits, target, drafter, "d") == (
        f"The drafter 'd' is for another target: its {name} is {actual}, the model's is "
        f"{expected}; use a drafter for this model."
    )


def test_a_drafter_with_tied_embeddings() -> None:
    assert message(check_fits, TARGET, EAGLE | {"tie_word_embeddings": True}, "d") == (
        "The drafter 'd' has tie_word_embeddings true in config.json, with which SGLang cannot "
        "share the target's head; set it to false."
    )


def test_a_model_instead_of_a_drafter() -> None:
    assert message(check_fits, TARGET, TARGET, "d").startswith("'d' is not a drafter:")


# ---- its size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "config", "size"),
    [
        ({}, {}, 0),
        ({"model.safetensors": 10}, {}, 10),
        ({"model.safetensors": 10}, {"dtype": "float32"}, 10),
        ({"a.safetensors": 10, "b.safetensors": 5}, {"torch_dtype": "bfloat16"}, 30),
        ({"a.safetensors": 10, "pytorch_model.bin": 5}, {"dtype": "float16"}, 20),
        ({"pytorch_model.bin": 5, "tokenizer.json": 99}, {}, 5),
    ],
)
def test_bytes_in_float32(
    tmp_path: Path, files: dict[str, int], config: dict[str, Any], size: int
) -> None:
    for name, count in files.items():
        (tmp_path / name).write_bytes(bytes(count))
    assert float32_bytes(str(tmp_path), config) == size
