"""How a combination is refused: the features of TLT, and rows that name what they exclude.

The rows themselves are in `refused`. Pure; runs wherever a configuration is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from tlt_sglang.config.settings import Config, Device
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import Strategy

T = TypeVar("T")

FeatureName = Literal["any", "pool", "deferring", "store", "sampling", "timeout"]


@dataclass(frozen=True)
class Feature:
    """A part of TLT that a configuration may turn on."""

    title: str
    """The feature, as documentation names it."""
    remedy: str
    """The words for turning it off; empty where that does not help."""
    text: Callable[[Config], str | None]
    """Returns the feature as the user has configured it; None where it is off."""


def _pool(config: Config) -> str | None:
    names = ",".join(map(str, config.pool))
    return f"--tlt-strategies {names}" if len(config.pool) > 1 else None


def _deferring(config: Config) -> str | None:
    without = any(not strategy.num_steps for strategy in config.pool)
    return _pool(config) if without else None


def _store(config: Config) -> str | None:
    return None if config.store is None else f"--tlt-store {config.store}"


def _sampling(config: Config) -> str | None:
    return "--tlt-sampling coupled" if config.sampling == "coupled" else None


def _timeout(config: Config) -> str | None:
    limit = config.client_timeout_s
    return None if limit is None else f"--tlt-client-timeout-s {limit:g}"


FEATURES: Mapping[FeatureName, Feature] = {
    "any": Feature("TLT", "", lambda config: "TLT"),
    "pool": Feature("several strategies", "name one strategy in --tlt-strategies", _pool),
    "deferring": Feature(
        "several strategies with `off` or `ngram`",
        "leave off and ngram out of --tlt-strategies",
        _deferring,
    ),
    "store": Feature("`--tlt-store`", "leave --tlt-store out", _store),
    "sampling": Feature("`--tlt-sampling coupled`", "use --tlt-sampling target", _sampling),
    "timeout": Feature("`--tlt-client-timeout-s`", "leave --tlt-client-timeout-s out", _timeout),
}


@dataclass(frozen=True)
class Refusal(Generic[T]):
    """One thing that features of TLT exclude; `T` is what shows whether it is there."""

    title: str
    """The thing, as documentation names it."""
    detect: Callable[[T], str | None]
    """Returns the thing as the user has configured it; None where it is absent."""
    features: tuple[FeatureName, ...]
    reason: str
    """A clause that says why the two do not go together."""
    remedy: str
    """The words for removing the thing."""
    devices: tuple[Device, ...] = ("cuda",)

    @property
    def excludes(self) -> list[str]:
        """The titles of the features that it excludes."""
        return [FEATURES[name].title for name in self.features]

    def check(self, config: Config, subject: T, device: Device) -> None:
        """Raise ConfigError if a feature that is on excludes what `subject` shows."""
        thing = self.detect(subject) if device in self.devices else None
        for name in self.features if thing is not None else ():
            feature = FEATURES[name]
            text = feature.text(config)
            if text is not None:
                remedy = ", or ".join(filter(None, (self.remedy, feature.remedy)))
                raise ConfigError(f"{thing} does not work with {text}: {self.reason}; {remedy}.")


def require_use(config: Config, strategy: Strategy | None) -> None:
    """Raise ConfigError for a store that no strategy would use.

    `strategy` is what runs where the configuration names none; None where that is open.
    """
    strategies = config.pool or ((strategy,) if strategy is not None else ())
    if not strategies:
        return
    names = ", ".join(map(str, strategies))
    learned = [one for one in strategies if one.num_steps]
    if config.store is not None and not learned:
        raise ConfigError(
            f"--tlt-store {config.store} is of no use to {names}, which has no drafter to train; "
            "add a strategy such as eagle3:3x1x4, or leave --tlt-store out."
        )


def require_started(config: Config, missing: Collection[FeatureName], served: str) -> None:
    """Raise ConfigError if a configured feature is among those that did not come up.

    `served` says how SGLang serves the model instead, such as "by NGRAMWorker".
    """
    for name in missing:
        feature = FEATURES[name]
        text = feature.text(config)
        if text is not None:
            raise ConfigError(
                f"{text} did not come up, as SGLang serves this model {served}; {feature.remedy}."
            )
