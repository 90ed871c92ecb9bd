"""Sizes and flags of the checks on a GPU, and those of a rehearsal of the same code on CPU."""

from __future__ import annotations

from dataclasses import dataclass

from tlt_sglang.config.sglang_arguments import DEFAULT_NGRAM, DEFAULT_SHAPES

POOL = ("off", *(f"eagle3:{shape}" for shape in DEFAULT_SHAPES), str(DEFAULT_NGRAM))
"""The default pool of an engine with an EAGLE-3 drafter."""
CHAIN = "eagle3:3x1x4"
MODEL = "smollm2-135m"
DUMMY = "dummy weights"
"""Part of the names of servers with dummy weights."""


@dataclass(frozen=True)
class Settings:
    """How large the checks are, and what every server is started with."""

    model: str
    server_flags: tuple[str, ...]
    deterministic_flags: tuple[str, ...]
    saver_flags: tuple[str, ...]
    """For releasing memory: weights keep a copy on the host, so that resuming restores them."""
    release_routes: tuple[str, str]
    """The routes that release memory and resume."""
    graph_sizes: tuple[int, ...]
    """Batch sizes of the graphs."""
    sizes: tuple[int, ...]
    """Requests at once, of the steps that are timed."""
    tokens: int
    """Tokens of an answer that is timed."""
    repetitions: int
    identity_prompts: int
    identity_tokens: int
    versions: int
    """Drafter versions that are published under load."""
    load_seconds: float
    """Time that a sidecar gets to learn from the load."""
    dummy: dict[str, int]
    """Shape of the model with dummy weights."""
    dummy_tokens: int
    """Tokens of its KV pool."""
    threads: int
    kept: int
    """Servers that run at once, if a part does not need more; the least recently used one stops."""
    patience: float
    """Factor of every part's time limit."""


_GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)

ON_GPU = Settings(
    model=MODEL,
    server_flags=(
        *("--device", "cuda", "--dtype", "bfloat16", "--attention-backend", "triton"),
        *("--sampling-backend", "pytorch", "--mem-fraction-static", "0.4"),
        *("--max-running-requests", "64", "--max-total-tokens", "65536"),
        *("--cuda-graph-bs-decode", *map(str, _GRAPH_SIZES)),
    ),
    deterministic_flags=("--enable-deterministic-inference",),
    saver_flags=(
        *("--enable-memory-saver", "--enable-weights-cpu-backup"),
        "--enable-draft-weights-cpu-backup",
    ),
    release_routes=("/release_memory_occupation", "/resume_memory_occupation"),
    graph_sizes=_GRAPH_SIZES,
    sizes=(1, 4, 16, 64),
    tokens=128,
    repetitions=2,
    identity_prompts=48,
    identity_tokens=256,
    versions=10,
    load_seconds=40.0,
    dummy={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "draft_vocab_size": 32000,
        "max_position_embeddings": 8192,
    },
    dummy_tokens=65536,
    threads=4,
    kept=2,
    patience=1.0,
)
"""The dummy model has the shape of Llama-3.1-8B."""

REHEARSAL = Settings(
    model=MODEL,
    server_flags=(
        *("--device", "cpu", "--max-running-requests", "4", "--max-total-tokens", "12288"),
    ),
    deterministic_flags=(),
    saver_flags=(),
    release_routes=("/pause_generation", "/continue_generation"),
    graph_sizes=_GRAPH_SIZES,
    sizes=(1, 2),
    tokens=64,
    repetitions=1,
    identity_prompts=4,
    identity_tokens=32,
    versions=2,
    load_seconds=5.0,
    dummy={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "draft_vocab_size": 512,
        "max_position_embeddings": 2048,
    },
    dummy_tokens=4096,
    threads=1,
    kept=1,
    patience=3.0,
)
"""On CPU memory cannot be released, so generation is paused in its place."""
