"""The servers of this folder speculate, each in its way."""

from __future__ import annotations

from tests.support.identity import Reference
from tests.support.servers import Server


def test_each_kind_speculates(speculative: Server, kind: str, reference: Reference) -> None:
    for prompt in (0, 6, 19):
        answer = speculative.generate(reference.prompts[prompt], 48)
        reference.compare(prompt, answer["output_ids"], 48)
    status = speculative.scheduler()
    assert sum(tally["accepted"] for tally in status["strategies"].values()) > 0
    assert (status.get("harvest") is not None) == (kind == "store and sidecar")
