"""sglang.srt.models.registry, in the main and scheduler processes: one model class at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.models.classes import ModelRegistry
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.models.registry:_ModelRegistry.is_arch_supported",
    why="the lookup of one model class imports all model modules, which takes seconds at each "
    "start",
    remove_when="SGLang imports model modules on demand",
    process="main, scheduler",
)
def is_arch_supported(original: Upstream, registry: ModelRegistry, architecture: str) -> object:
    from tlt_sglang.models.classes import provide

    provide(registry, architecture)
    return original(registry, architecture)


PATCHES = (is_arch_supported,)
