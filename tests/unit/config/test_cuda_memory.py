"""SGLang leaves room on a device for graphs, pending tokens and copies for the log."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tlt_sglang.config.cuda_memory import reserved_bytes, sidecar_bytes
from tlt_sglang.config.settings import Config
from tlt_sglang.config.sglang_flags import Flags
from tlt_sglang.graphs.sizes import ModelSizes

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
POOL = ("off", "eagle3:1x1x2", "eagle3:3x1x4")
GB = 10**9


@pytest.fixture
def args(tmp_path: Path) -> Flags:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return Flags(str(tmp_path), max_running_requests=48)


def test_one_strategy_needs_nothing_beside_sglangs_own(args: Flags) -> None:
    assert reserved_bytes(Config(("eagle3:3x1x4",)), args) == 0


def test_a_pool_needs_room_for_its_graphs_and_pending_tokens(args: Flags) -> None:
    """Seven backends of four tables of 25 MB at 48 requests are 0.7 GB, and 0.27 GB may wait."""
    need = reserved_bytes(Config(POOL), args)
    assert 1.3 * GB < need < 3 * GB
    args.context_length = 8192
    assert need - reserved_bytes(Config(POOL), args) == 7 * 4 * 4 * 48 * (131072 - 8192)
    limited = reserved_bytes(Config(POOL, graph_memory_gb=0.5), args)
    assert limited < 0.5 * GB + 2 * 128 * 2**20


def test_verified_rows_need_room_with_the_triton_backend(args: Flags) -> None:
    """Four rows for each of 48 requests: 1 MB of slots and 128 kB of partial results a row."""
    need = reserved_bytes(Config(POOL), args)
    args.attention_backend = "triton"
    row = 131072 * 8 + 4096 * 32
    assert reserved_bytes(Config(POOL), args) - need == 4 * 48 * row
    assert reserved_bytes(Config(), args) == 48 * row
    args.speculative_num_draft_tokens = 6
    assert reserved_bytes(Config(), args) == 6 * 48 * row


def test_a_log_needs_room_for_a_prefill_and_for_steps_that_wait(args: Flags) -> None:
    """Features of an 8B model take 32 kB a token; a swap has its largest matrix on the device."""
    config = Config(("eagle3:3x1x4",), store="s")
    matrix, waiting = 2 * 4096 * 14336, 256 * 2**20
    assert reserved_bytes(config, args) == matrix + waiting + 8192 * 32768
    args.chunked_prefill_size = 2048
    assert reserved_bytes(config, args) == matrix + waiting + 2048 * 32768
    small = dataclasses.replace(config, harvest_gb=0.02)  # of which half is logged of a prefill
    assert reserved_bytes(small, args) == matrix + waiting + 10_000_000
    assert reserved_bytes(dataclasses.replace(config, harvest_gb=0), args) == matrix


def test_a_sidecar_of_an_8b_target_needs_some_ten_gigabytes() -> None:
    """0.29 billion trained weights five times in float32, embedding and heads, and 1.5 GB."""
    need = sidecar_bytes(ModelSizes.from_config(LLAMA_8B, 32000))
    assert 10 * GB < need < 11 * GB


def test_a_model_of_unknown_sizes_is_not_planned() -> None:
    assert reserved_bytes(Config(POOL), Flags("some/model")) == 2 * 128 * 2**20
