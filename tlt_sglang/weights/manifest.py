"""The manifest of a published version, and an error for each reason not to use one.

JSON, read without torch. Format 1; other formats are refused.
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
    """The version does not exist, or no longer."""


class NoManifest(BadVersion):
    """Its manifest is missing."""


class BadManifest(BadVersion):
    """Its manifest or its notes cannot be read, or contradict its weights."""


class Unreadable(BadVersion):
    """This machine cannot read its weights now; others may, and it may later."""


class Truncated(BadVersion):
    """Its weights are missing, or shorter or longer than published."""


class Damaged(BadVersion):
    """Its weights differ from those that were published."""


class NotFinite(BadVersion):
    """Its weights contain NaN or infinity in the dtype in which they are used."""


class WrongNames(BadVersion):
    """The names of its weights are not the drafter's."""


class WrongShape(BadVersion):
    """A weight differs from the drafter's in shape or kind."""


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
    """An additional identifier of the target; compared where both sides have one."""

    def differs(self, other: Base) -> str:
        """Return the first field that differs with both values, or ""."""
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
        """Return whether the dtype can be cast to any other floating dtype."""
        return self.dtype in ("F64", "F32", "BF16", "F16")

    def fits(self, other: Spec) -> bool:
        """Return whether the shapes are equal, and the dtypes unless both are floating."""
        return self.shape == other.shape and (
            self.dtype == other.dtype or (self.floating and other.floating)
        )

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Expected:
    """The weights that the running drafter can take over."""

    architecture: str
    base: Base
    tensors: Mapping[str, Spec]
    """Spec of each weight by name, with the dtype that it runs in."""


@dataclass(frozen=True)
class Manifest:
    """The manifest of one version."""

    version: int
    sha256: str
    """Digest of weights.safetensors."""
    size: int
    """Bytes of weights.safetensors."""
    architecture: str
    """`eagle` or `eagle3`."""
    base: Base
    tensors: Mapping[str, Spec]
    parent: int | None
    """The version that training continued from."""
    gate: Mapping[str, Any]
    """The figures of the gate that it passed."""
    made_by: str
    epoch: int = 0
    """That of the lease under which it was published (see `lease`); 0 without one."""

    def to_json(self) -> str:
        """Return it as it is stored."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(version: int, text: bytes) -> Manifest:
        """Parse a stored manifest. Raises BadManifest."""
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise BadManifest(
                    version, "its manifest has another format", "publish it with this"
                )
            values["base"] = Base(**values["base"])
            values["tensors"] = {
                name: Spec(spec["dtype"], tuple(spec["shape"]))
                for name, spec in values["tensors"].items()
            }
            manifest = Manifest(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadManifest(version, "its manifest cannot be read") from error
        if manifest.version != version:
            raise BadManifest(version, f"its manifest is that of version {manifest.version}")
        return manifest

    def check(self, expected: Expected) -> None:
        """Raise WrongTarget, WrongNames or WrongShape unless the version fits `expected`."""
        remedy = "publish one that is made for this target and drafter"
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
