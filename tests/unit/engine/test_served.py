"""A start ends where what SGLang has built excludes a configured feature."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tlt_sglang.config.settings import Config
from tlt_sglang.engine.engine import Engine
from tlt_sglang.engine.served import check, features_width
from tlt_sglang.errors import ConfigError
from tlt_sglang.patching.patcher import Patcher

pytestmark = pytest.mark.sglang

POOL = Config(("off", "eagle3:3x1x4"))
STORE = Config(("eagle3:3x1x4",), store="s")
COUPLED = Config(("eagle3:3x1x4",), sampling="coupled")
PLAIN = Config(("eagle3:3x1x4",))
FEATURES = (
    (
        POOL,
        "--tlt-strategies off,eagle3:3x1x4 did not come up, as SGLang serves this model {}; name "
        "one strategy in --tlt-strategies.",
    ),
    (
        STORE,
        "--tlt-store s did not come up, as SGLang serves this model {}; leave --tlt-store out.",
    ),
)


class Drafter(torch.nn.Module):
    """A drafter of one linear layer of SGLang's."""

    def __init__(self, quantised: bool) -> None:
        from sglang.srt.layers.linear import ReplicatedLinear
        from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

        super().__init__()
        config = W8A8Int8Config({}) if quantised else None
        self.fc = ReplicatedLinear(8, 8, quant_config=config, prefix="fc")


def worker(
    name: str = "eagle_worker_v2:EAGLEWorkerV2",
    *,
    quantised: bool = False,
    **fields: Any,
) -> Any:
    """Return a worker of SGLang's that was not initialised, with a drafter."""
    import importlib

    from transformers import LlamaConfig

    module, _, name = name.partition(":")
    kind = getattr(importlib.import_module(f"sglang.srt.speculative.{module}"), name)
    made: Any = object.__new__(kind)
    hf_config = LlamaConfig(**{"architectures": ["LlamaForCausalLMEagle3"], **fields})
    model_config = SimpleNamespace(hf_config=hf_config)
    runner = SimpleNamespace(model_config=model_config, model=Drafter(quantised))
    made._draft_worker = SimpleNamespace(draft_runner=runner)
    return made


def message(function: Any, *arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        function(*arguments)
    return str(error.value)


# -- before graphs are captured --------------------------------------------------------------------


@pytest.mark.parametrize(("config", "sentence"), FEATURES)
@pytest.mark.parametrize(
    "name",
    ["frozen_kv_mtp_worker_v2:FrozenKVMTPWorkerV2", "standalone_worker_v2:StandaloneWorkerV2"],
)
def test_a_worker_with_states_of_its_own(config: Config, sentence: str, name: str) -> None:
    expected = sentence.format(f"by {name.partition(':')[2]}")
    assert message(check, config, "cuda", worker(name)) == expected
    check(PLAIN, "cuda", worker(name))


@pytest.mark.parametrize("config", [POOL, STORE, COUPLED, PLAIN])
def test_the_worker_that_is_extended(config: Config) -> None:
    check(config, "cuda", worker())
    check(config, "cpu", worker())


def test_prediction_heads_that_were_named_by_a_hub_id() -> None:
    heads = worker(architectures=["DeepseekV3ForCausalLMNextN"])
    assert "The drafter DeepseekV3ForCausalLMNextN does not work with" in message(
        check, POOL, "cuda", heads
    )
    check(PLAIN, "cuda", heads)


def test_a_layer_that_is_quantised() -> None:
    assert message(check, STORE, "cuda", worker(quantised=True)) == (
        "The drafter's fc is quantised (W8A8Int8LinearMethod), so published versions cannot be "
        "swapped in; use --speculative-draft-model-quantization unquant with a drafter that is not "
        "quantised, or leave --tlt-store out."
    )
    check(POOL, "cuda", worker(quantised=True))


# -- once the scheduler stands ---------------------------------------------------------------------


def attach(config: Config, draft_worker: object) -> Engine:
    """Attach an engine to a scheduler with this worker."""
    patcher = Patcher((), "cpu")
    patcher.apply()
    engine = Engine(config, "cpu", patcher)
    scheduler: Any = SimpleNamespace(
        draft_worker=draft_worker,
        server_args=SimpleNamespace(
            speculative_algorithm="EAGLE3", speculative_draft_model_path="d"
        ),
    )
    engine.attach(scheduler)
    return engine


@pytest.mark.parametrize(("config", "sentence"), FEATURES)
def test_a_feature_that_did_not_come_up(config: Config, sentence: str) -> None:
    assert message(attach, config, None) == sentence.format("without a drafter")
    multi = worker("multi_layer_eagle_worker_v2:MultiLayerEagleWorkerV2")
    assert message(attach, config, multi) == sentence.format("by MultiLayerEagleWorkerV2")


@pytest.mark.parametrize("config", [PLAIN, COUPLED, Config(("off",))])
def test_features_that_are_off(config: Config) -> None:
    assert attach(config, None).scheduler is not None


# -- the width of the log --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "width"),
    [
        ("eagle3", {}, 4 * 64),
        ("eagle3", {"target_hidden_size": 96}, 3 * 96 + 96),
        ("eagle3", {"num_aux_hidden_states": 5}, 6 * 64),
        ("eagle", {}, 64),
    ],
)
def test_the_log_is_as_wide_as_what_sglang_feeds_the_drafter(
    kind: str, fields: dict[str, int], width: int
) -> None:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    runner: Any = SimpleNamespace(
        spec_algorithm=SpeculativeAlgorithm.from_string(kind),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(**fields), hidden_size=64, spec_hidden_size=64
        ),
    )
    assert features_width(runner, kind, fields.get("target_hidden_size", 64)) == width
