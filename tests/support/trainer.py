"""A trainer that sends weights to a server through a process group, as RL stacks do, on gloo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from tests.support.servers import Server
from tests.support.update_group import GROUP, group_to_form

TIMEOUT = timedelta(seconds=60)


class Trainer:
    """Rank 0 of the group that a server has joined as rank 1."""

    def __init__(self, server: Server, group: Any) -> None:
        self._server, self._group = server, group

    def send(self, tensors: Mapping[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
        """Ask the server to receive the tensors, broadcast them, and return its answer."""
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "group_name": GROUP,
        }
        path = "/update_weights_from_distributed"
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._server.post, path, body | fields)
            for tensor in tensors.values():
                torch.distributed.broadcast(tensor.contiguous(), src=0, group=self._group)
            result: dict[str, Any] = answer.result()
        return result


@contextmanager
def trainer(server: Server) -> Iterator[Trainer]:
    """Form the group with a server, and destroy it at the end on both sides."""
    port, body = group_to_form()
    with ThreadPoolExecutor(1) as thread:
        joined = thread.submit(server.post, "/init_weights_update_group", body)
        group = form(port)
        assert joined.result()["success"], joined.result()
    try:
        yield Trainer(server, group)
    finally:
        answer = server.post("/destroy_weights_update_group", {"group_name": GROUP})
        torch.distributed.destroy_process_group(group)
        assert answer["success"], answer


def form(port: int) -> Any:
    """Return rank 0's side of the group, once the other rank has joined."""
    from sglang.srt.utils.common import init_custom_process_group

    return init_custom_process_group(
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        timeout=TIMEOUT,
        world_size=2,
        rank=0,
        group_name=GROUP,
    )
