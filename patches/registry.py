"""sglang.srt.models.registry, in the main and scheduler processes: import one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.models.classes import ModelRegistry
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.models.registry"
_WHY = "the lookup of one model class imports all model modules, which takes seconds at each start"
_REMOVE = "SGLang imports model modules on demand"


@wraps_upstream(
    f"{_MODULE}:_ModelRegistry.resolve_model_cls",
    why=_WHY,
    remove_when=_REMOVE,
    process="main, scheduler",
)
def resolve_model_cls(
    original: Upstream, registry: ModelRegistry, architectures: str | list[str]
) -> object:
    from tlt_sglang.models.classes import provide

    provide(registry, architectures)
    return original(registry, architectures)


PATCHES = (resolve_model_cls,)
