"""The drafter catches up in an extend that every attention backend has, and hardly waits for it.

The batch that is run is SGLang's own; the model is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tlt_sglang.engine import deferred
from tlt_sglang.engine.pending import PendingBatch

pytestmark = pytest.mark.sglang

PENDING = PendingBatch(
    [0, 2], [3, 1], torch.arange(12.0).view(4, 3), torch.tensor([7, 8, 9, 5]), [2, 1]
)
LENGTHS = torch.tensor([6, 9, 4])


class HostReads(TorchFunctionMode):
    """Counts the calls that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "nonzero"):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


class Plain:
    """An object of SGLang's without anything special: other attributes are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Request(Plain):
    """A request with three prompt tokens and one of its answer."""

    extend_end, full_untruncated_fill_ids = 1, (0,)
    origin_input_ids, output_ids = (1, 2, 3), (4,)

    def __init__(self, rid: str) -> None:
        self.rid = rid


class Runner(Plain):
    """The drafter's model runner, which keeps the batch it is given."""

    device, server_args, model_config = "cpu", SimpleNamespace(), Plain()
    prefill_attention_backend_str, ps = "torch_native", SimpleNamespace(attn_dcp_size=1)
    ngram_embedding_manager = SimpleNamespace(enabled=False)
    kv_index_translator: Any
    batch: Any

    def forward(self, batch: Any) -> Any:
        self.batch, self.shared_read_done_event = batch, "the step has read its inputs"
        output = SimpleNamespace(next_token_logits="logits", hidden_states="hidden states")
        return SimpleNamespace(logits_output=output)


def catch_up(runner: Runner, reads: HostReads) -> Any:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.runtime_context import get_parallel

    translators: Any = pytest.importorskip(
        "sglang.srt.mem_cache.kv_index_translator", reason="this SGLang finds KV slots elsewhere"
    )

    requests: Any = [Request(name) for name in "abc"]
    batch: Any = ScheduleBatch(
        reqs=requests,
        req_pool_indices=torch.tensor([2, 0, 1]),
        seq_lens=LENGTHS,
        seq_lens_cpu=LENGTHS,
    )
    table = torch.arange(30).view(3, 10)
    runner.kv_index_translator = translators.KVIndexTranslator(
        req_to_token=table,
        token_to_kv_pool_allocator=None,
        token_to_kv_pool=None,
        page_size=1,
        device="cpu",
    )
    worker: Any = SimpleNamespace(
        draft_runner=runner, req_to_token_pool=SimpleNamespace(req_to_token=table)
    )
    rows, counts = torch.tensor(PENDING.rows), torch.tensor(PENDING.counts)
    lengths = LENGTHS[rows]
    with get_parallel().override(moe_ep_size=1, attn_dp_size=1, attn_dcp_size=1), reads:
        return deferred._extend_with_sglang(
            worker, batch, PENDING, lengths, counts, rows, lengths.clone()
        )


def test_it_is_a_ragged_extend_that_does_not_wait() -> None:
    runner, reads = Runner(), HostReads()
    assert catch_up(runner, reads) == ("logits", "hidden states")
    batch = runner.batch
    assert batch.forward_mode.name == "EXTEND"
    assert batch.extend_seq_lens.tolist() == [3, 1]
    assert batch.extend_prefix_lens.tolist() == [3, 3]
    assert batch.positions.tolist() == [3, 4, 5, 3]
    assert batch.out_cache_loc.tolist() == [23, 24, 25, 13]
    assert runner.shared_read_done_event is None
    # Lengths that are on the host, and on CPU SGLang's own reads of single positions.
    assert [call for call in reads.calls if call != "item"] == ["__int__", "tolist"]


def test_the_host_knows_the_lengths_without_the_step_in_flight() -> None:
    """SGLang has no lengths on the host where the attention backend does without."""
    batch: Any = SimpleNamespace(reqs=[Request(name) for name in "abc"], seq_lens_cpu=None)
    lengths = deferred._lengths_on_host(batch, PENDING)
    assert lengths is not None and lengths.tolist() == [5, 4]
    unknown = replace(PENDING, recent=None)
    assert deferred._lengths_on_host(batch, unknown) is None
    batch.seq_lens_cpu = LENGTHS
    lengths = deferred._lengths_on_host(batch, unknown)
    assert lengths is not None and lengths.tolist() == [6, 4]
