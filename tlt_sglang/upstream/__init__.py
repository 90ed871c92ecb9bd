"""SGLang's versions and objects, as far as the product needs them, named once.

`versions` lists the versions, `api` says what differs between them, and `v23` and its like are the
implementations, of which `current` returns one. `protocols` lists the attributes, private ones
among them, that are relied on: an upgrade of SGLang has to check these. Imports `errors` alone, and
SGLang only in methods that are called.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from tlt_sglang.upstream import versions

if TYPE_CHECKING:
    from tlt_sglang.upstream.api import Sglang


@functools.cache
def current() -> Sglang:
    """Return the adapter of the installed SGLang. Raises EnvironmentProblem if there is none."""
    shape = versions.shape_of(versions.installed())
    adapter: Sglang = importlib.import_module(f"{__name__}.{shape}").Adapter()
    return adapter
