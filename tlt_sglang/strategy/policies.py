"""Builds the policy that a configuration names.

Pure; called once in the scheduler process. The policies themselves live in modules of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policy import AllowedStrategies, Fixed, Policy, Restricted, Shuffle
from tlt_sglang.strategy.strategies import Strategy


class PolicySettings(Protocol):
    """The part of a configuration that names the policy."""

    @property
    def policy(self) -> str:
        """The policy's name."""

    @property
    def max_batch(self) -> int | None:
        """The largest batch size that is speculated on; None sets no limit."""


def make(
    config: PolicySettings,
    strategies: Sequence[Strategy],
    allowed: AllowedStrategies | None = None,
) -> Policy:
    """Return the policy of `config` over `strategies`; `allowed` limits them by batch size.

    Raises ConfigError if the strategies do not suit the policy.
    """
    if config.policy == "cost-model":
        return CostModel(strategies, max_batch=config.max_batch, allowed=allowed)
    policy = _without_costs(config, strategies)
    limited = _below_max_batch(config.max_batch, strategies, allowed)
    return policy if limited is None else Restricted(policy, limited)


def _below_max_batch(
    max_batch: int | None,
    strategies: Sequence[Strategy],
    allowed: AllowedStrategies | None,
) -> AllowedStrategies | None:
    """Return `allowed`, restricted to plain decoding above `max_batch` requests."""
    plain = [strategy for strategy in strategies if strategy.drafter == "off"]
    if max_batch is None or not plain:
        return allowed

    def limited(batch_size: int) -> Sequence[Strategy]:
        if batch_size > max_batch:
            return plain
        return strategies if allowed is None else allowed(batch_size)

    return limited


def _without_costs(config: PolicySettings, strategies: Sequence[Strategy]) -> Policy:
    most = config.max_batch
    try:
        if config.policy == "beg-mab":
            return BegMab(strategies) if most is None else BegMab(strategies, max_batch=most)
        if config.policy == "ema":
            return Ema(strategies)
        if config.policy == "fixed":
            return Fixed(strategies[0])
        return Shuffle(strategies)
    except ValueError as error:
        raise ConfigError(f"The policy {config.policy} cannot be used: {error}.") from error
