"""The process group through which a trainer sends weights to a server, on gloo.

Imports nothing heavy: a client that is killed before the group is formed starts in no time.
"""

from __future__ import annotations

import socket
from typing import Any

GROUP = "weight_update_group"


def group_to_form() -> tuple[int, dict[str, Any]]:
    """Return a free port, and the body of the call that has a server join as rank 1 there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port, {
        "master_address": "127.0.0.1",
        "master_port": port,
        "rank_offset": 1,
        "world_size": 2,
        "group_name": GROUP,
        "backend": "gloo",
    }
