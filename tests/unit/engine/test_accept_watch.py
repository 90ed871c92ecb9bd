"""A drafter whose drafts are not accepted after an update of the weights is noticed, once."""

from __future__ import annotations

from tlt_sglang.engine.accept_watch import STEPS, AcceptWatch


def steps(watch: AcceptWatch, accepted: int, count: int = STEPS) -> list[str]:
    """Count steps one by one; return what was to be logged."""
    return [text for _ in range(count) if (text := watch.step([accepted]))]


def test_a_drafter_that_is_lost() -> None:
    watch = AcceptWatch()
    assert steps(watch, 2) == []
    watch.updated()
    watch.updated()  # an update in two parts
    assert steps(watch, 0, STEPS - 1) == []
    (warning,) = steps(watch, 0)
    assert warning.startswith(
        "The accept length is 1.00 over 256 verify steps since the weights were updated; before it "
        "was 3.00."
    )
    assert watch.losses == 1
    assert watch.status() == {
        "accept_length_before": 3.0,
        "accept_length_since": 1.0,
        "warning": warning,
    }
    watch.updated()
    assert watch.warning == warning  # until the next finding
    assert steps(watch, 1) == []
    assert watch.status()["warning"] is None


def test_no_update_no_warning() -> None:
    assert steps(AcceptWatch(), 0, 2 * STEPS) == []


def test_an_accept_length_that_falls_a_little() -> None:
    watch = AcceptWatch()
    steps(watch, 2)
    watch.updated()
    assert steps(watch, 1) == []
    assert watch.losses == 0


def test_a_drafter_that_was_of_no_use_before() -> None:
    watch = AcceptWatch()
    steps(watch, 0)
    watch.updated()
    assert steps(watch, 0) == []


def test_an_update_before_the_first_request() -> None:
    watch = AcceptWatch()
    watch.updated()
    (warning,) = steps(watch, 0)
    assert "since the weights were updated. Check" in warning
    assert watch.status()["accept_length_before"] is None


def test_a_few_steps_do_not_replace_what_is_known() -> None:
    watch = AcceptWatch()
    steps(watch, 2)
    watch.updated()
    steps(watch, 0, STEPS // 2)
    watch.updated()
    (warning,) = steps(watch, 0)
    assert "before it was 3.00" in warning
