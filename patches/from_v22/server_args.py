"""sglang.srt.server_args, in the main process: its fields, as a dataclass has them."""

from __future__ import annotations

from tlt_sglang.patching.patch import Patch
from tlt_sglang.upstream import dataclass_fields as upstream_fields

dataclass_fields = Patch(
    "sglang.srt.server_args:ServerArgs",
    upstream_fields.dataclass_fields,
    why="RL stacks look at dataclasses.fields(ServerArgs), which is no dataclass any more",
    remove_when="verl, slime, miles and UniRL look at the fields of a struct",
    process="main",
    kind="register",
    key="__dataclass_fields__",
)

PATCHES = (dataclass_fields,)
