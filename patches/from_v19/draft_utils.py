"""sglang.srt.speculative.draft_utils, in the scheduler process: draft backends on CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.layers import DraftBackendFactory
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.speculative.draft_utils:DraftBackendFactory._create_backend",
    why="the table of draft backends has no entry for CPUs without AMX",
    remove_when="plugins can register backends in SGLang's table of draft backends",
    process="scheduler",
    only_on="cpu",
)
def create_backend(
    original: Upstream,
    factory: DraftBackendFactory,
    backend_name: str,
    backend_map: dict[str, object],
    error_template: str,
    stamps_children: bool = False,
) -> object:
    from tlt_sglang.cpu.attention import CpuAttnBackend, CpuMultiStepDraftBackend

    runner = factory.draft_model_runner
    if stamps_children:

        def create() -> tuple[str, object]:
            steps = factory.speculative_num_steps
            return "torch_native", CpuMultiStepDraftBackend(runner, factory.topk, steps)
    else:

        def create() -> tuple[str, object]:
            return "torch_native", CpuAttnBackend(runner)

    table = backend_map | {"torch_native": create, "intel_amx": create}
    return original(factory, backend_name, table, error_template, stamps_children)


PATCHES = (create_backend,)
