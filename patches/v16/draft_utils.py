"""sglang.srt.speculative.draft_utils, in the scheduler process: draft backends on CPU.

The backends of this shape have no name beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    backend_map: dict[str, Any],
    error_template: str,
) -> object:
    from tlt_sglang.cpu.attention import CpuAttnBackend, CpuMultiStepDraftBackend

    runner = factory.draft_model_runner

    def create() -> object:
        # The table of draft steps and that of draft-extend differ in the names of their entries.
        if "decode" not in backend_map["triton"].__name__:
            return CpuAttnBackend(runner)
        return CpuMultiStepDraftBackend(runner, factory.topk, factory.speculative_num_steps)

    table = backend_map | {"torch_native": create, "intel_amx": create}
    return original(factory, backend_name, table, error_template)


PATCHES = (create_backend,)
