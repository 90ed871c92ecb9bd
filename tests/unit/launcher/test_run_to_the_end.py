"""The helper of the tests that runs a program to its end, and names what the program leaves."""

from __future__ import annotations

import sys

import pytest

from tests.support import launching


def test_output_and_status() -> None:
    program = "import sys; print('o'); print('e', file=sys.stderr); sys.exit(3)"
    done = launching.run([sys.executable, "-c", program])
    assert (done.status, done.out, done.err) == (3, "o\n", "e\n")


def test_a_process_that_is_left_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has inherited the program's output."""
    monkeypatch.setattr(launching, "END_SECONDS", 0.1)
    program = "import subprocess, sys; print('left', file=sys.stderr, flush=True)\n"
    program += "subprocess.Popen(['sleep', '60'])"
    with pytest.raises(AssertionError, match="left"):
        launching.run([sys.executable, "-c", program], seconds=30)
