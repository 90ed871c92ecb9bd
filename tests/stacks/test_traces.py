"""The calls of each RL stack, replayed against a server with several strategies and a drafter.

They hold the stacks that cannot run here, and those whose own code is tested elsewhere. A stack
that opens sessions of updates needs an SGLang that has them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.test_weights import SESSIONS, checksums
from tests.stacks.replaying import CHANGED, Replay, names
from tests.support.servers import Server, Servers
from tests.support.tiny import make_drafter, make_target

PROMPT = [5, 9, 14, 3] * 4


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("traces") / "target", "llama", 64)


@pytest.fixture(scope="module")
def server(servers: Servers, target: Path) -> Server:
    drafter = make_drafter(target.with_name("drafter"), target, "eagle")
    flags = ("--skip-tokenizer-init", "--dtype", "float32", "--tlt-policy", "random")
    pool = "off,eagle:3x1x4,ngram:6"
    return servers.get(pool, *flags, model=str(target), drafter=str(drafter))


@pytest.mark.usefixtures("share_through_files")
@pytest.mark.parametrize("stack", names(SESSIONS))
def test_the_calls_of(stack: str, server: Server, target: Path) -> None:
    drafter = checksums(server, "draft")
    replay = Replay(server, str(target), weight(target), PROMPT)
    replay.play(stack)
    assert replay.generated >= 2
    assert checksums(server, "draft") == drafter
    assert server.healthy()
    server.wait_until_idle()


def weight(target: Path) -> torch.Tensor:
    """Return the tensor that the updates change, as the checkpoint has it."""
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        if CHANGED in tensors:
            return tensors[CHANGED].float()
    raise AssertionError(f"{target} does not have {CHANGED}")
