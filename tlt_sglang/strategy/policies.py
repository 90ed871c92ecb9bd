"""The policies by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tlt_sglang.config.config import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.arms import Strategy
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policy import Fixed, Policy, Restricted, Shuffle


def make(
    config: Config,
    strategies: Sequence[Strategy],
    possible: Callable[[int], Sequence[Strategy]] | None = None,
) -> Policy:
    """The policy of `config` over `strategies`, of which not all may be `possible` at a batch size.

    Raises ConfigError where they do not suit it.
    """
    if config.policy == "cost-model":
        return CostModel(strategies, max_batch=config.max_batch, possible=possible)
    policy = _other(config, strategies)
    limited = _limited(config.max_batch, strategies, possible)
    return policy if limited is None else Restricted(policy, limited)


def _limited(
    most: int | None,
    strategies: Sequence[Strategy],
    possible: Callable[[int], Sequence[Strategy]] | None,
) -> Callable[[int], Sequence[Strategy]] | None:
    """`possible`, and above a batch size of `most` plain decoding only."""
    plain = [arm for arm in strategies if arm.drafter == "off"]
    if most is None or not plain:
        return possible

    def limited(batch_size: int) -> Sequence[Strategy]:
        if batch_size > most:
            return plain
        return strategies if possible is None else possible(batch_size)

    return limited


def _other(config: Config, strategies: Sequence[Strategy]) -> Policy:
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
