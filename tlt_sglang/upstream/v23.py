"""The newest shape of SGLang: its settings are namespaces of `runtime_context`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tlt_sglang.upstream import arguments
from tlt_sglang.upstream.api import Sglang

if TYPE_CHECKING:
    import torch

    from tlt_sglang.upstream.layers import DecoderModel, GrammarMask, LogitsProcessor
    from tlt_sglang.upstream.protocols import (
        Batch,
        DraftWorker,
        LogitsOutput,
        ModelRunner,
        SamplingInfo,
        SpecSettings,
        StepResult,
        TokenizerManager,
        VerifyInput,
    )
    from tlt_sglang.upstream.requests import Manager
    from tlt_sglang.upstream.results import AnsweredRequest, DecodeResult
    from tlt_sglang.upstream.scheduled import ArrivedRequest, IntakeScheduler
    from tlt_sglang.upstream.weight_updates import (
        UpdatedRunner,
        UpdatedWorker,
        UpdateManager,
        UpdateSession,
    )


class Adapter(Sglang):
    """See `tlt_sglang.upstream.api.Sglang`, also for the docstrings."""

    def limits(self) -> Sequence[str]:
        return ()

    # -- settings of the engine --------------------------------------------------------------------

    def is_resolved(self, server_args: Any) -> bool:
        return bool(getattr(server_args, "_resolution_finished", False))

    def mark(self, server_args: Any) -> None:
        arguments.mark(server_args)

    def resolve_again(self, server_args: Any) -> bool:
        import msgspec

        fields, assign = server_args.__struct_fields__, msgspec.Struct.__setattr__
        return arguments.resolve_again(server_args, fields, assign)

    def spec(self) -> SpecSettings:
        from sglang.srt.runtime_context import get_spec

        spec: SpecSettings = get_spec()
        return spec

    def with_spec(self, **settings: object) -> AbstractContextManager[object]:
        from sglang.srt.runtime_context import get_spec

        context: AbstractContextManager[object] = get_spec().override(**settings)
        return context

    def captured_sizes(self) -> Sequence[int] | None:
        from sglang.srt.runtime_context import get_exec

        graphs = get_exec().graph.cuda_graph_config
        sizes: Sequence[int] | None = graphs.decode.bs if graphs is not None else None
        return sizes

    def with_captured_sizes(self, sizes: list[int] | None) -> AbstractContextManager[object]:
        from sglang.srt.model_executor.cuda_graph_config import with_phase
        from sglang.srt.runtime_context import get_exec

        graph = get_exec().graph
        if sizes is None or graph.cuda_graph_config is None:
            return contextlib.nullcontext()
        decode = {"bs": sizes} if sizes else {"backend": "disabled"}
        config = with_phase(graph.cuda_graph_config, "decode", **decode)
        context: AbstractContextManager[object] = graph.override(cuda_graph_config=config)
        return context

    def page_size(self) -> int:
        from sglang.srt.mem_cache.allocation_sizing import get_alloc_page_size

        size: int = get_alloc_page_size()
        return size

    def is_deterministic(self) -> bool:
        from sglang.srt.runtime_context import get_exec

        return bool(get_exec().deterministic.enable_deterministic_inference)

    def has_metrics(self) -> bool:
        from sglang.srt.runtime_context import get_observability

        return bool(get_observability().enable_metrics)

    def returns_hidden_states(self) -> bool:
        from sglang.srt.model_executor import forward_batch_info

        return bool(forward_batch_info.get_server_return_hidden_states_mode().need_capture())

    def serve_app(self, name: str) -> None:
        from sglang.srt.environ import envs

        envs.SGLANG_HTTP_SERVER_APP_PATH.set(name)

    # -- drafting ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def draft_contexts(self, draft: DraftWorker) -> Iterator[None]:
        from sglang.srt.speculative import eagle_worker_v2 as eagle

        with (
            self._draft_placement(draft),
            eagle.speculative_moe_backend_context(),
            eagle.speculative_moe_a2a_backend_context(),
        ):
            yield

    def _draft_placement(self, draft: DraftWorker) -> AbstractContextManager[object]:
        """Return the context of the drafter's tensor-parallel group."""
        from sglang.srt.speculative import eagle_worker_v2 as eagle

        context: AbstractContextManager[object] = eagle.draft_tp_context(draft.parallel_layout)
        return context

    def slots_per_step(self) -> int:
        from sglang.srt.mem_cache.allocation_sizing import get_alloc_len_per_decode

        slots: int = get_alloc_len_per_decode()
        return slots

    def chain_to_verify(
        self, draft: DraftWorker, batch: Batch, drafts: torch.Tensor
    ) -> VerifyInput:
        from sglang.srt.speculative.eagle_worker_common import build_eagle_verify_input

        size, depth = len(batch.reqs), draft.speculative_num_steps
        verify_input: VerifyInput = build_eagle_verify_input(
            batch,
            batch.spec_info,
            draft._topk1_parents_prealloc[:size],
            draft._topk1_score_indices_prealloc[:size],
            drafts,
            None,
            target_worker=draft.target_worker,
            topk=1,
            num_steps=depth,
            num_draft_tokens=depth + 1,
            tree_mask_mode=draft.tree_mask_mode,
            device=draft.device,
        )
        return verify_input

    def extend_batch(self, batch: Batch, runner: ModelRunner) -> Any:
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

        return ForwardBatch.init_new(
            batch,
            runner,
            capture_hidden_mode=CaptureHiddenMode.LAST,
            return_hidden_states_before_norm=False,
        )

    def decode_graph_runner(self, runner: ModelRunner) -> Callable[..., object]:
        graphs: Callable[..., object] = runner._decode_cuda_graph_runner_cls()
        return graphs

    def processors(self, info: Any) -> list[tuple[int, Any, Sequence[int]]]:
        entries = (info.custom_logit_processor or {}).items()
        return [(key, entry.processor, entry.rows) for key, entry in entries]

    def set_processor(self, info: Any, key: int, processor: object) -> None:
        info.custom_logit_processor[key].processor = processor

    def asks_for_masks(self, info: SamplingInfo) -> bool:
        return info.sampling_mask_batch_indices is not None

    def sampled(self, tokens: torch.Tensor) -> object:
        return tokens, None

    def grammar_mask(self, verify_input: VerifyInput, mask: Any) -> GrammarMask | None:
        applied: GrammarMask | None = mask
        return applied

    # -- outputs of the target ---------------------------------------------------------------------

    def model_output(self, hidden: torch.Tensor, captured: torch.Tensor) -> object:
        return hidden, captured.flatten(1)

    def keep_last_hidden_states(self, processor: LogitsProcessor) -> None:
        processor.keep_last_hidden_states = True

    def last_hidden_states(self, output: LogitsOutput) -> torch.Tensor | None:
        return output.last_hidden_states

    def accept_index(self, result: StepResult) -> torch.Tensor | None:
        return result.accept_index

    def non_draft_tokens(self, result: DecodeResult) -> int:
        return result.num_non_draft_tokens_per_req

    def uncommit(self, request: AnsweredRequest, tokens: int) -> None:
        request.kv.kv_committed_len -= tokens

    def retain(self, result: DecodeResult, row: int, runs: list[list[int]]) -> None:
        if result.grammar_retained_tokens is None:
            result.grammar_retained_tokens = [None] * len(runs)
        result.grammar_retained_tokens[row] = runs[row]

    def request_values(self) -> list[int]:
        return []

    # -- requests, models and weights --------------------------------------------------------------

    def weight_version(self, manager: TokenizerManager) -> object:
        return manager.config_value("weight_version")

    def truncates(self, manager: Manager) -> bool:
        return manager.allow_auto_truncate

    def drop_unused(self, manager: Any, call: Any) -> None:
        pass  # SGLang does so itself

    def tokenized_requests(self, scheduler: IntakeScheduler, received: Any) -> Sequence[Any]:
        return scheduler._tokenized_requests(received)

    def acted(self, updated: bool) -> object:
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        return SetInternalStateReqOutput(updated=updated)

    def send_abort(
        self, scheduler: IntakeScheduler, abort: object, request: ArrivedRequest
    ) -> None:
        scheduler.send_abort_output(abort, request)

    def update_groups(self, runner: UpdatedRunner) -> Sequence[str]:
        return list(runner.weight_updater._model_update_group)

    def draft_runners(self, worker: UpdatedWorker) -> Sequence[UpdatedRunner]:
        return [runner for _, runner in worker.weight_update_runners()]

    def has_input_norm(self, model: DecoderModel) -> bool:
        return model.input_norm is not None

    def update_session(self, updater: UpdateManager) -> UpdateSession | None:
        return updater._session
