"""What a published version says of itself, and what is wrong with one that must not be used.

JSON, read without torch. Format 1; another format is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tlt_sglang.errors import TltError

FORMAT = 1


class BadVersion(TltError):
    """A version that must not be used; the base of all reasons."""

    def __init__(self, version: int, reason: str, remedy: str = "publish it again") -> None:
        super().__init__(f"Drafter version {version} is not used: {reason}; {remedy}.")
        self.version = version


class NoVersion(BadVersion):
    """There is no such version, or no longer."""


class NoManifest(BadVersion):
    """Its manifest is missing."""


class BadManifest(BadVersion):
    """Its manifest or its notes cannot be read, or say what is not so."""


class Truncated(BadVersion):
    """Its weights are shorter or longer than they were, or missing."""


class Damaged(BadVersion):
    """Its weights are not those that were published."""


class NotFinite(BadVersion):
    """Its weights hold NaN or infinity, in the dtype that they are used in."""


class WrongNames(BadVersion):
    """Its weights have other names than the drafter's."""


class WrongShape(BadVersion):
    """One of its weights has another shape or kind than the drafter's."""


class WrongTarget(BadVersion):
    """It was made for another target or drafter."""


@dataclass(frozen=True)
class Base:
    """The target that a drafter is made for."""

    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layers: int
    name: str = ""
    """Whatever else tells targets apart; compared where both sides have one."""

    def differs(self, other: Base) -> str:
        """The first field that differs, or ""."""
        for field in fields(self):
            one, two = getattr(self, field.name), getattr(other, field.name)
            if one != two and (field.name != "name" or (one and two)):
                return f"{field.name.replace('_', ' ')} {one}, not {two}"
        return ""


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor, with safetensors' names for dtypes: F32, BF16, F16, I64 ..."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        """Whether it can be cast to any other floating dtype."""
        return self.dtype in ("F64", "F32", "BF16", "F16")

    def fits(self, other: Spec) -> bool:
        """Same shape, and the same dtype unless both are floating."""
        return self.shape == other.shape and (
            self.dtype == other.dtype or (self.floating and other.floating)
        )

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """What the drafter that runs can take over."""

    architecture: str
    base: Base
    tensors: Mapping[str, Spec]
    """By name; the dtypes are those that it runs in."""


@dataclass(frozen=True)
class Manifest:
    """Of one version."""

    version: int
    sha256: str
    """Of weights.safetensors."""
    size: int
    """Its bytes."""
    architecture: str
    """`eagle` or `eagle3`."""
    base: Base
    tensors: Mapping[str, Spec]
    parent: int | None
    """The version that training went on from."""
    gate: Mapping[str, Any]
    """The figures that it was published for."""
    made_by: str

    def to_json(self) -> str:
        """As it is stored."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(version: int, text: bytes) -> Manifest:
        """Raises BadManifest."""
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise BadManifest(version, "its manifest has another format", "publish with this")
            found["base"] = Base(**found["base"])
            found["tensors"] = {
                name: Spec(spec["dtype"], tuple(spec["shape"]))
                for name, spec in found["tensors"].items()
            }
            manifest = Manifest(**found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadManifest(version, "its manifest cannot be read") from error
        if manifest.version != version:
            raise BadManifest(version, f"its manifest is that of version {manifest.version}")
        return manifest

    def check(self, expected: Expected) -> None:
        """Raise WrongTarget, WrongNames or WrongShape unless it says that it fits."""
        remedy = "publish one that is made for this"
        if self.architecture != expected.architecture:
            reason = f"it is an {self.architecture} drafter, not {expected.architecture}"
            raise WrongTarget(self.version, reason, remedy)
        if other := self.base.differs(expected.base):
            raise WrongTarget(self.version, f"it is for a target with {other}", remedy)
        if odd := sorted(self.tensors.keys() ^ expected.tensors.keys()):
            word = "lacks" if odd[0] in expected.tensors else "has an unknown"
            raise WrongNames(self.version, f"it {word} {odd[0]}", remedy)
        for name, spec in self.tensors.items():
            if not spec.fits(expected.tensors[name]):
                reason = f"{name} is {spec}, not {expected.tensors[name]}"
                raise WrongShape(self.version, reason, remedy)
