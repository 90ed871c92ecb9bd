"""The target as the sidecar trains against it: the embedding and head that engines announce.

When the target's weights are updated, an engine publishes its new embedding and head. A drafter
whose checkpoint has a head keeps that, as in the engine, and what it learns to predict is the
target's; one without a head has the target's.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from tlt_sglang.errors import TltError
from tlt_sglang.harvest.announce import Announcement
from tlt_sglang.training.simulate import Frozen
from tlt_sglang.weights import describe


class TargetFollower:
    """Loads the embedding and head of the newest version of the target that is announced.

    `draft_ids` [D] are the drafter's tokens in the target's vocabulary, `own_head` [D, N] is the
    head of its checkpoint, None where it has none.
    """

    def __init__(
        self,
        draft_ids: torch.Tensor,
        own_head: torch.Tensor | None,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.version = -1
        """Version of the target that was loaded last."""
        self._path: str | None = None
        self._draft_ids, self._own_head = draft_ids, own_head
        self._vocab_size, self._device = vocab_size, device

    def load(self, engine: Announcement) -> Frozen:
        """Load what `engine` announces. Raises OSError or TltError."""
        if engine.embed_and_head:
            weights = load_file(engine.embed_and_head)
            embedding = weights["embedding"]
            head = weights.get("head", embedding)
        else:
            embedding, head = describe.embedding_and_head(engine.model)
        own_head = self._own_head
        rows = head[self._draft_ids].bfloat16()
        if own_head is not None and torch.equal(own_head.bfloat16(), rows):
            own_head = None  # one tensor instead of two
        frozen = Frozen.of(embedding[: self._vocab_size], head, self._draft_ids, own_head)
        self.version, self._path = engine.target_version, engine.embed_and_head
        return frozen.to(self._device, torch.float32)

    def update(self, engines: list[Announcement]) -> Frozen | None:
        """Return the frozen parts of a newer version of the target, if one is announced."""
        if not engines:
            return None
        newest = max(engines, key=lambda engine: engine.target_version)
        if (newest.target_version, newest.embed_and_head) == (self.version, self._path):
            return None
        if newest.embed_and_head == "":
            return None  # the engine cannot provide them
        try:
            return self.load(newest)
        except (OSError, TltError):
            return None  # replaced by a newer version just now
