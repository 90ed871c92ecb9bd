"""sglang.srt.models.registry, in the main and scheduler processes: import one model, not all."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream

_MODULE = "sglang.srt.models.registry"
_WHY = "looking up one model class imports every model module, seconds of each start"
_REMOVE = "SGLang imports model modules on demand"


@wraps_upstream(
    f"{_MODULE}:_ModelRegistry.resolve_model_cls",
    why=_WHY,
    remove_when=_REMOVE,
    process="main, scheduler",
    digests={"0.5.23": "77c0a4c7b70438d3"},
)
def resolve_model_cls(original: Any, registry: Any, architectures: Any) -> Any:
    from tlt_sglang.models.classes import provide

    provide(registry, architectures)
    return original(registry, architectures)


@wraps_upstream(
    f"{_MODULE}:_ModelRegistry.is_arch_supported",
    why=_WHY,
    remove_when=_REMOVE,
    process="main, scheduler",
    digests={"0.5.23": "9789f6fb00675789"},
)
def is_arch_supported(original: Any, registry: Any, architecture: str) -> Any:
    from tlt_sglang.models.classes import provide

    provide(registry, architecture)
    return original(registry, architecture)


PATCHES = (resolve_model_cls, is_arch_supported)
