"""The shape of SGLang whose settings are fields of ServerArgs and entries of namespaces, too.

Part of SGLang reads the fields, and part the namespaces of `runtime_context`, which are made of
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import v16

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import DecoderModel, GrammarMask
    from tlt_sglang.upstream.protocols import (
        DraftWorker,
        ModelRunner,
        TokenizerManager,
        VerifyInput,
    )


class Adapter(v16.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def weight_version(self, manager: TokenizerManager) -> object:
        return manager.config_value("weight_version")

    # -- settings of the engine --------------------------------------------------------------------

    @contextlib.contextmanager
    def with_spec(self, **settings: object) -> Iterator[None]:
        from sglang.srt.runtime_context import get_spec

        with super().with_spec(**settings), get_spec().override(**settings):
            yield

    @contextlib.contextmanager
    def _with_graphs(self, graphs: Any) -> Iterator[None]:
        from sglang.srt.runtime_context import get_exec

        entries = get_exec().graph
        with super()._with_graphs(graphs), entries.override(cuda_graph_config=graphs):
            yield

    def returns_hidden_states(self) -> bool:
        from sglang.srt.model_executor import forward_batch_info
        from sglang.srt.runtime_context import get_server_args

        mode = forward_batch_info.get_server_return_hidden_states_mode(get_server_args())
        return bool(mode.need_capture())

    # -- drafting ----------------------------------------------------------------------------------

    def decode_graph_runner(self, runner: ModelRunner) -> Callable[..., object]:
        graphs: Callable[..., object] = runner._decode_cuda_graph_runner_cls()
        return graphs

    def grammar_mask(self, verify_input: VerifyInput, mask: Any) -> GrammarMask | None:
        applied: GrammarMask | None = mask
        return applied

    # -- requests, models and weights --------------------------------------------------------------

    def has_input_norm(self, model: DecoderModel) -> bool:
        return model.input_norm is not None


@contextlib.contextmanager
def with_drafter(worker: DraftWorker) -> Iterator[None]:
    """Give the drafter's own copy of the arguments what `with_spec` and `with_captured_sizes` say.

    They change the arguments of the target.
    """
    from sglang.srt.runtime_context import get_exec

    fields = {
        "speculative_eagle_topk": worker.topk,
        "cuda_graph_config": get_exec().graph.cuda_graph_config,
    }
    with v16.with_fields(worker.draft_runner.server_args, fields):
        yield
