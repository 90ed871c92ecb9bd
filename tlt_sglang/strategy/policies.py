"""The policies by their names."""

from __future__ import annotations

from collections.abc import Sequence

from tlt_sglang.config import Config
from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.arms import Strategy
from tlt_sglang.strategy.beg_mab import BegMab
from tlt_sglang.strategy.cost_model import CostModel
from tlt_sglang.strategy.ema import Ema
from tlt_sglang.strategy.policy import Fixed, Policy, Shuffle


def make(config: Config, strategies: Sequence[Strategy]) -> Policy:
    """The policy of `config` over `strategies`; raises ConfigError where they do not suit it."""
    most = config.max_batch
    try:
        if config.policy == "beg-mab":
            return BegMab(strategies) if most is None else BegMab(strategies, max_batch=most)
        if config.policy == "ema":
            return Ema(strategies)
        if config.policy == "fixed":
            return Fixed(strategies[0])
        if config.policy == "random":
            return Shuffle(strategies)
        return CostModel(strategies, max_batch=most)
    except ValueError as error:
        raise ConfigError(f"The policy {config.policy} cannot be used: {error}.") from error
