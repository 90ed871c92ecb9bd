"""The one type that carries a request's tokens and hidden states, from the harvest log to a batch.

`assemble` makes it of records, the sidecar's buffer keeps it, `tlt train` reads it from disk, and
`training.batches` packs it. Two types beside it are other things: a `Record` is an entry of the
binary log, a few tokens with a checksum and flags; a `PackedBatch` is many sequences in tensors,
with the positions and boundaries of each token.

Imports neither torch nor numpy: the arrays are numpy's in the log and torch's in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar


class Array(Protocol):
    """A numpy array or a tensor, as far as a sequence looks at its own."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Self: ...

    @property
    def nbytes(self) -> int:
        """Memory of the values."""


ArrayT = TypeVar("ArrayT", bound=Array)


@dataclass(frozen=True, eq=False)
class TokenSequence(Generic[ArrayT]):
    """L consecutive tokens of one request, with the hidden states of one version of the target.

    `features[i]` and `last[i]` are what the target computed where `ids[i]` was its input. N is the
    target's hidden size, A the hidden states that a drafter reads of it (3 for EAGLE-3, 1 for
    EAGLE). Raises ValueError where the arrays differ in length.
    """

    ids: ArrayT
    """[L] token ids."""
    features: ArrayT
    """[L, A * N]: what the drafter reads of the target."""
    prompt_length: int
    """Tokens at the start that belong to the prompt."""
    last: ArrayT | None = None
    """[L, N]: what the target's head reads; None where that is `features`, as for EAGLE."""
    request: str = ""
    """Key of the request; the same for every sequence of it."""
    start: int = 0
    """Absolute position of the first token."""
    target_version: int = 0
    """Version of the target's weights that computed the hidden states."""
    rl_step: int = 0
    """RL step in which the request ran; counts up."""
    ended: bool = False
    """True if the request ended with the last token."""

    def __post_init__(self) -> None:
        rows = {len(self.ids), len(self.features), len(self.head_input)}
        if len(rows) > 1:
            raise ValueError(f"request {self.request}: ids and features have {sorted(rows)} rows")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def end(self) -> int:
        """Return the absolute position after the last token."""
        return self.start + len(self.ids)

    @property
    def head_input(self) -> ArrayT:
        """Return what the target's head reads [L, N]."""
        return self.features if self.last is None else self.last

    @property
    def response_start(self) -> int:
        """Return the index of the first token to predict; a first token has nothing before it."""
        return max(1, self.prompt_length)

    @property
    def response_length(self) -> int:
        """Return the number of tokens after the prompt."""
        return len(self) - self.prompt_length

    @property
    def nbytes(self) -> int:
        """Return the memory of the arrays."""
        last = 0 if self.last is None else int(self.last.nbytes)
        return int(self.ids.nbytes) + int(self.features.nbytes) + last

    def window(self, first: int, length: int) -> TokenSequence[ArrayT]:
        """Return at most `length` tokens from index `first` on, as views of the same arrays."""
        rows = slice(first, first + length)
        return TokenSequence(
            self.ids[rows],
            self.features[rows],
            max(1, self.response_start - first),
            None if self.last is None else self.last[rows],
            self.request,
            self.start + first,
            self.target_version,
            self.rl_step,
            self.ended and first + length >= len(self),
        )
