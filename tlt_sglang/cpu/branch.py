"""SGLang's constant `_is_cpu` of its verification, which excludes CPUs from sampling.

Where that is not the argument of a function, the constant is replaced by `IS_CPU`. Runs in the
scheduler process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class IsCpu:
    """True, but False while a batch is verified by sampling."""

    def __init__(self) -> None:
        self._samples = False

    def __bool__(self) -> bool:
        return not self._samples

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """Return a context in which it is False."""
        self._samples = True
        try:
            yield
        finally:
            self._samples = False


IS_CPU = IsCpu()
