"""sglang.srt.speculative.cpp_ngram.ngram_corpus, in the scheduler process: how it is compiled.

SGLang compiles its corpus of n-grams when the first server with n-grams starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.speculative.cpp_ngram.ngram_corpus:NgramCorpus.__init__",
    why="a header of the corpus uses size_t without an include, which GCC 12 refuses",
    remove_when="this shape of SGLang is not supported any more",
    process="scheduler",
)
def init(original: Upstream, corpus: object, *args: object, **kwargs: object) -> None:
    with _with_cstddef():
        original(corpus, *args, **kwargs)


@contextlib.contextmanager
def _with_cstddef() -> Iterator[None]:
    """Have the C++ compiler include <cstddef> first; $CXX is its command in SGLang's build."""
    before = os.environ.get("CXX")
    os.environ["CXX"] = f"{before or 'c++'} -include cstddef"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CXX"]
        else:
            os.environ["CXX"] = before


PATCHES = (init,)
