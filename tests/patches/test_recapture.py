"""An update of the weights cannot capture anew the graphs of a pool, of which SGLang knows one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from patches.from_v16 import weight_updater as patched
from tlt_sglang.config.settings import Device
from tlt_sglang.engine import engine

pytestmark = pytest.mark.sglang

DONE = (True, "Succeeded to update model weights.")


def update(**options: bool) -> tuple[bool, str]:
    """Update the weights as SGLang's manager does, up to SGLang's own function."""
    wrapped: Any = patched.update_weights_from_disk
    updater = SimpleNamespace(get_model=lambda: SimpleNamespace())
    run = wrapped.make(lambda updater, model_path, load_format, **options: DONE)
    answer: tuple[bool, str] = run(updater, "folder", "auto", **options)
    return answer


def use(monkeypatch: pytest.MonkeyPatch, device: Device, pool: object | None) -> None:
    step = SimpleNamespace(pool=pool)
    monkeypatch.setattr(engine, "current", SimpleNamespace(device=device, step=step))


def test_several_strategies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "cuda", object())
    assert update(recapture_cuda_graph=True) == (
        False,
        "recapture_cuda_graph does not work with several strategies, each of which has graphs of "
        "its own; leave it out, as an update changes weights in place.",
    )
    assert update(recapture_cuda_graph=False) == DONE
    assert update() == DONE


@pytest.mark.parametrize(("device", "pool"), [("cuda", None), ("cpu", object())])
def test_one_strategy_and_engines_without_graphs(
    monkeypatch: pytest.MonkeyPatch, device: Device, pool: object | None
) -> None:
    use(monkeypatch, device, pool)
    assert update(recapture_cuda_graph=True) == DONE
