"""The limits of a model and an engine, as the rules of admission need them. Runs anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one engine."""

    vocabulary: int
    """Token ids are below it."""
    context: int
    """The most tokens of a prompt and its answer."""
    longest_prompt: int
    """The most tokens of a prompt."""
    hidden_size: int
    """The width of an input embedding."""
    truncates: bool = False
    """True if the engine shortens prompts that are too long."""

    @property
    def last_token(self) -> int:
        """The largest token id."""
        return self.vocabulary - 1
