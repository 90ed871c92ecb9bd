"""The capture plan: shared graphs, the reach of a batch size, and what a budget drops."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest

from tlt_sglang.graphs import commands
from tlt_sglang.graphs.model_plan import BATCH_SIZES
from tlt_sglang.graphs.plan import Graph, Use, needs, plan
from tlt_sglang.graphs.sizes import GPUS, ModelSizes, expected_throughput, step_seconds
from tlt_sglang.strategy.strategies import Strategy, parse

OFF = parse("off")
WIDE, CHAIN, NGRAM = parse("eagle3:5x8x32"), parse("eagle3:3x1x4"), parse("ngram:4")
LLAMA = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}
SIZES = ModelSizes.from_config(LLAMA, 32000)


def each(graphs: Collection[Graph]) -> int:
    """Return a byte for each graph."""
    return len(graphs)


def even(strategy: Strategy, size: int) -> float:
    """Return the tokens that a strategy verifies, as its expected throughput."""
    return float(strategy.num_draft_tokens)


def test_the_graphs_of_a_strategy() -> None:
    assert needs(Use(OFF, 4)) == (Graph("verify", (0, 1, 1), 4),)
    assert needs(Use(NGRAM, 4)) == (Graph("verify", (3, 1, 4), 4),)
    assert set(needs(Use(CHAIN, 4))) == {
        Graph("verify", (3, 1, 4), 4),
        Graph("extend", (3, 1, 4), 4),
        Graph("draft", (3, 1, 4), 4),
    }
    assert len(needs(Use(parse("eagle3:1x1x2"), 4))) == 2


def test_graphs_are_shared() -> None:
    made = plan([CHAIN, NGRAM], [1, 2], each, None, even)
    assert made.naive_bytes == 2 * (1 + 3 + 1)
    assert made.shared_bytes == made.bytes == 2 * (1 + 3)
    assert made.strategies(2) == [OFF, CHAIN, NGRAM]


def test_wide_strategies_are_for_small_batches() -> None:
    made = plan([WIDE, CHAIN], [1, 8, 64], each, None, even, max_rows=256)
    assert [made.strategies(size) for size in (1, 8, 64)] == [
        [OFF, WIDE, CHAIN],
        [OFF, WIDE, CHAIN],
        [OFF, CHAIN],
    ]
    made = plan([WIDE, CHAIN], [1, 8, 64], each, None, even, max_batch=8)
    assert made.strategies(64) == [OFF]


def test_a_budget_drops_the_least_useful_graphs() -> None:
    """The better one of two strategies stays; plain decoding always does."""
    for budget in range(2, 9):
        made = plan([WIDE, CHAIN], [1, 2], each, budget, even)
        assert made.bytes <= budget
        assert {Use(OFF, 1), Use(OFF, 2)} <= set(made.uses)
        assert set(made.uses).isdisjoint(made.dropped)
        kept = {use for use in made.uses if use.strategy != OFF}
        if kept:  # a CHAIN is kept only where the budget has room for WIDE, too
            assert all(Use(WIDE, size) in kept for strategy, size in kept)
    with pytest.raises(ValueError, match="plain decoding alone"):
        plan([CHAIN], [1, 2], each, 1, even)


def test_losses_are_shares_of_the_throughput() -> None:
    made = plan([WIDE], [1], each, 1, even)
    assert made.dropped == {Use(WIDE, 1): pytest.approx(1 - 1 / 32)}


def test_an_eight_billion_model_as_in_the_paper() -> None:
    """Single 7.81 GB, naive 30.39, bucketed 10.69 (arXiv 2511.16665): the same order, and at most
    1.4 times the single one."""
    pool = [parse(t) for t in ("eagle3:8x10x64", "eagle3:6x8x48", "eagle3:5x6x32", "eagle3:4x4x16")]
    sizes = [size for size in BATCH_SIZES if size <= 128]

    def h100(strategy: Strategy, size: int) -> float:
        return expected_throughput(SIZES, GPUS["h100"], strategy, size)

    single = plan(pool[:1], sizes, SIZES.memory, None, h100, max_rows=10**9)
    made = plan(pool, sizes, SIZES.memory, None, h100)
    assert single.bytes < made.naive_bytes
    assert made.naive_bytes > 2 * made.bytes
    assert made.bytes <= 1.4 * single.bytes
    assert 2e9 < made.bytes < made.shared_bytes <= made.naive_bytes < 60e9


def test_costs_grow_from_memory_bound_to_compute_bound() -> None:
    one, eight, many = (step_seconds(SIZES, GPUS["h100"], OFF, size) for size in (1, 8, 1024))
    assert 0.004 < one < 0.01
    assert eight < 1.05 * one
    assert many > 3 * one
    assert step_seconds(SIZES, GPUS["h100"], CHAIN, 1) > one


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def test_the_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--model", model, "--tlt-graph-memory-gb", "1.5"]) == 0
    out = capsys.readouterr().out
    assert "eagle3:5x8x32" in out and "naive" in out and "chosen" in out
    chosen = next(line for line in out.splitlines() if line.startswith("chosen"))
    assert float(chosen.split()[-2]) <= 1.5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tlt-graph-memory-gb", "0.01"], "0.01 is not possible: plain decoding alone takes"),
        (["--tlt-strategies", "eagle9"], "Unknown strategy 'eagle9'"),
        (["--max-running-requests", "0"], "'0' must be greater than 0"),
        (["--gpu", "abacus"], "invalid choice"),
    ],
)
def test_bad_flags_are_one_line(
    model: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["--model", model, *flags]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("gpu", "strategies", "default"),
    [
        ("h100", "off,eagle3:3x4x8", "fa3"),
        ("b200", "off,eagle3:3x1x4,eagle3:3x4x8", "trtllm_mha"),
        ("h100", "off,eagle3:3x1x4", None),
        ("a100", "off,eagle3:3x4x8", None),
    ],
)
def test_a_tree_changes_the_attention_backend_of_all(
    model: str, gpu: str, strategies: str, default: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main(["--model", model, "--gpu", gpu, "--tlt-strategies", strategies]) == 0
    *_, note, _, sidecar = capsys.readouterr().out.splitlines()
    assert note.startswith("With eagle3:3x4x8") == (default is not None)
    assert default is None or f"it is {default} where all of them are chains" in note
    assert sidecar.startswith("A sidecar that trains on the same GPU needs about ")


def test_another_kind_of_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert commands.main(["--model", str(tmp_path)]) == 1
    assert "plans are made for Llama-like models" in capsys.readouterr().err
