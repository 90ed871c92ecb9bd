"""When a batch is verified by its largest logits alone: only where upstream would do no more.

The tests import SGLang in their bodies, so that collecting them does not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from patches.eagle_utils import _is_merely_greedy

pytestmark = pytest.mark.sglang


def batch(mode: str = "TARGET_VERIFY", **info: Any) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    plain = {
        "is_all_greedy": True,
        "logit_bias": None,
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "has_watermark_candidates": False,
    }
    return SimpleNamespace(
        forward_mode=ForwardMode[mode], sampling_info=SimpleNamespace(**plain | info)
    )


def test_a_greedy_batch() -> None:
    assert _is_merely_greedy(batch())
    assert _is_merely_greedy(batch(), watermark_state=object())  # which none of them asked for


@pytest.mark.parametrize(
    "other",
    [
        {"is_all_greedy": False},
        {"logit_bias": object()},
        {"acc_additive_penalties": object()},
        {"acc_scaling_penalties": object()},
    ],
)
def test_whoever_changes_logits_goes_the_way_of_upstream(other: dict[str, Any]) -> None:
    assert not _is_merely_greedy(batch(**other))


def test_so_does_what_is_beside_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.environ import envs
    from sglang.srt.speculative import spec_utils

    assert not _is_merely_greedy(batch("IDLE"))
    assert not _is_merely_greedy(batch(), object())  # a grammar
    marked = batch(has_watermark_candidates=True)
    assert not _is_merely_greedy(marked, watermark_state=object())
    with envs.SGLANG_SANITIZE_NAN_LOGITS.override(True):
        assert not _is_merely_greedy(batch())
    monkeypatch.setattr(spec_utils, "SIMULATE_ACC_LEN", 2.0)
    assert not _is_merely_greedy(batch())
