"""The shape of SGLang whose settings are fields of ServerArgs, and whose weights have no sessions.

An update of the weights is one call, which loads the target's weights into the drafter, too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import v19

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import DecoderModel, GrammarMask
    from tlt_sglang.upstream.protocols import (
        ModelRunner,
        SpecSettings,
        VerifyInput,
    )
    from tlt_sglang.upstream.results import DecodeResult
    from tlt_sglang.upstream.scheduled import IntakeScheduler


class Adapter(v19.Adapter):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def limits(self) -> Sequence[str]:
        return (
            *v19.LIMITS,
            "Set TLT_CONFIG before Python starts, and install TLT from a wheel, which has a .pth "
            "file: the arguments of this SGLang cannot be resolved again.",
            "In a streaming session, the answers of later turns may differ from plain decoding's "
            "with this SGLang.",
        )

    def weight_version(self, manager: Any) -> object:
        return manager.server_args.weight_version

    # -- settings of the engine --------------------------------------------------------------------

    def is_resolved(self, server_args: Any) -> bool:
        return False  # they are resolved by their constructor

    def mark(self, server_args: Any) -> None:
        pass  # every process loads plugins

    def resolve_again(self, server_args: Any) -> bool:
        return False  # what the operator asked for is not kept

    def spec(self) -> SpecSettings:
        spec: SpecSettings = _server_args()
        return spec

    def with_spec(self, **settings: object) -> AbstractContextManager[object]:
        return with_fields(_server_args(), settings)

    def captured_sizes(self) -> Sequence[int] | None:
        graphs = _server_args().cuda_graph_config
        sizes: Sequence[int] | None = graphs.decode.bs if graphs is not None else None
        return sizes

    def with_captured_sizes(self, sizes: list[int] | None) -> AbstractContextManager[object]:
        graphs = _server_args().cuda_graph_config
        if sizes is None or graphs is None:
            return contextlib.nullcontext()
        changed = copy.deepcopy(graphs)
        if sizes:
            changed.decode.bs = sizes
        else:
            changed.decode.backend = "disabled"
        return self._with_graphs(changed)

    def _with_graphs(self, graphs: Any) -> AbstractContextManager[object]:
        """Return a context in which graphs are captured as this configuration says."""
        return with_fields(_server_args(), {"cuda_graph_config": graphs})

    def page_size(self) -> int:
        return int(_server_args().page_size)

    def is_deterministic(self) -> bool:
        return bool(_server_args().enable_deterministic_inference)

    def has_metrics(self) -> bool:
        return bool(_server_args().enable_metrics)

    def returns_hidden_states(self) -> bool:
        return bool(_server_args().enable_return_hidden_states)

    # -- drafting ----------------------------------------------------------------------------------

    def decode_graph_runner(self, runner: ModelRunner) -> Callable[..., object]:
        from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

        graphs: Callable[..., object] = DecodeCudaGraphRunner
        return graphs

    def grammar_mask(self, verify_input: VerifyInput, mask: Any) -> GrammarMask | None:
        return None if mask is None else _GrammarMask(verify_input, mask)

    # -- outputs of the target ---------------------------------------------------------------------

    def uncommit(self, request: Any, tokens: int) -> None:
        request.kv_committed_len -= tokens

    def retain(self, result: DecodeResult, row: int, runs: list[list[int]]) -> None:
        pass  # SGLang reads the runs themselves

    # -- requests, models and weights --------------------------------------------------------------

    def tokenized_requests(self, scheduler: IntakeScheduler, received: Any) -> Sequence[Any]:
        from sglang.srt.managers import io_struct

        single = io_struct.TokenizedGenerateReqInput, io_struct.TokenizedEmbeddingReqInput
        several = (
            io_struct.BatchTokenizedGenerateReqInput,
            io_struct.BatchTokenizedEmbeddingReqInput,
        )
        if isinstance(received, single):
            return [received]
        return list(received) if isinstance(received, several) else []

    def has_input_norm(self, model: DecoderModel) -> bool:
        return False


class _GrammarMask:
    """A mask [T, V / 32] that the grammar of a verify step applies."""

    def __init__(self, verify_input: Any, mask: torch.Tensor) -> None:
        self._grammar, self._mask = verify_input.grammar, mask

    def apply(self, logits: torch.Tensor) -> None:
        self._grammar.apply_vocab_mask(logits=logits, vocab_mask=self._mask)


def _server_args() -> Any:
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


@contextlib.contextmanager
def with_fields(args: Any, fields: dict[str, object]) -> Iterator[None]:
    """Give fields of the arguments other values; SGLang's own way to do so logs every call."""
    before = {name: getattr(args, name) for name in fields}
    try:
        for name, value in fields.items():
            object.__setattr__(args, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(args, name, value)
