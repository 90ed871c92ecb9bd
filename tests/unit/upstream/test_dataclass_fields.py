"""A record of msgspec's is looked at as a dataclass, with its names, types and defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from tlt_sglang.upstream.dataclass_fields import dataclass_fields


class Record(msgspec.Struct):
    """A record as SGLang's ServerArgs is one."""

    path: str
    size: int = 3
    names: list[str] = msgspec.field(default_factory=list)


@dataclasses.dataclass
class Old:
    """A record of an older SGLang."""

    path: str


def test_a_record() -> None:
    fields = dataclass_fields(Record)
    assert list(fields) == ["path", "size", "names"]
    assert fields["path"].default is dataclasses.MISSING
    assert fields["size"].default == 3
    factory: Any = fields["names"].default_factory
    assert factory() == []


def test_a_dataclass() -> None:
    assert dataclass_fields(Old) is Old.__dataclass_fields__
