"""The training step is plain PyTorch, and the same for `tlt train` and the sidecar, to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.support.learning import drafter, frozen, sequences
from tlt_sglang.sidecar.buffer import Buffer
from tlt_sglang.sidecar.learner import Learner
from tlt_sglang.sidecar.learner_settings import LearnerSettings
from tlt_sglang.training.batches import PackedBatch
from tlt_sglang.training.losses import LossName
from tlt_sglang.training.models import Algorithm, Drafter
from tlt_sglang.training.simulate import loss_of
from tlt_sglang.training.step import StepSettings, TrainingStep
from tlt_sglang.training.trainer import Trainer, TrainerSettings

CPU = torch.device("cpu")
SETTINGS = StepSettings(
    accumulate=2,
    learning_rate=1e-2,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    clip=0.5,
    bfloat16=False,
)


def assert_equal(one: Drafter, other: Drafter) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("algorithm", ["eagle3", "eagle"])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("loss", ["soft", "lk"])
def test_the_step_is_plain_pytorch(algorithm: Algorithm, bfloat16: bool, loss: LossName) -> None:
    settings = replace(SETTINGS, bfloat16=bfloat16, loss=loss)
    depth = 3 if algorithm == "eagle3" else 1
    model, shared = drafter(algorithm), frozen(algorithm)
    reference = copy.deepcopy(model)
    batches = [PackedBatch.of(sequences([9, 14], algorithm, seed)) for seed in range(6)]

    step = TrainingStep(model, settings, CPU)
    losses = []
    for number, batch in enumerate(batches):
        losses.append(float(step.add(shared, batch, depth).total.detach()))
        assert step.is_complete == (number % 2 == 1)
        if step.is_complete:
            step.update(1e-2 / (1 + number))

    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    for number, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            total = loss_of(reference.train(), shared, batch, depth, loss).total
        torch.autograd.backward(total / 2)
        assert losses[number] == float(total.detach())
        if number % 2:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert_equal(model, reference)


def test_trainer_and_learner_come_to_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = sequences([20, 20, 20, 20])
    offline = TrainerSettings(
        steps=1, epochs=2, batch_tokens=20, accumulate=2, warmup=0.0, floor=1.0, precision="float32"
    )
    trainer = Trainer(drafter(), frozen(), texts, [20] * 4, offline, CPU)
    order = [index for epoch in range(2) for (index,) in trainer._batches(epoch)]
    assert len(list(trainer.run())) == 4

    online = LearnerSettings(steps=1, accumulate=2, warmup=1, learning_rate=offline.learning_rate)
    learner = Learner(drafter(), frozen(), Buffer(1 << 20), online, CPU)
    sampled = iter(order)
    monkeypatch.setattr(learner, "draw", lambda: [texts[next(sampled)]])
    for _ in order:
        assert learner.micro_step()
    assert learner.step == 4
    assert_equal(trainer.drafter, learner.drafter)


def test_dropped_gradients_do_not_count() -> None:
    texts = [PackedBatch.of(sequences([9, 14], seed=seed)) for seed in range(3)]
    one, other = drafter(), drafter()
    interrupted, plain = TrainingStep(one, SETTINGS, CPU), TrainingStep(other, SETTINGS, CPU)
    interrupted.add(frozen(), texts[0], 2)
    interrupted.drop_gradients()
    for step in (interrupted, plain):
        for batch in texts[1:]:
            assert not step.is_complete
            step.add(frozen(), batch, 2)
        step.update(1e-2)
    assert_equal(one, other)


def test_gradients_that_are_not_finite_are_dropped() -> None:
    batch = PackedBatch.of(sequences([9, 14]))
    model, same = drafter(), drafter()
    step = TrainingStep(model, SETTINGS, CPU)
    step.add(frozen(), batch, 2)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad[:] = torch.nan
        break
    assert not step.update(1e-2)
    assert_equal(model, same)
    step.add(frozen(), batch, 2)
    assert step.update(1e-2) and all(p.isfinite().all() for p in model.parameters())


def test_a_state_is_restored_in_the_middle_of_a_step() -> None:
    """A sidecar that has helped another one goes on in its place."""
    batch = PackedBatch.of(sequences([9, 14]))
    one = TrainingStep(drafter(), SETTINGS, CPU)
    one.add(frozen(), batch, 2)
    one.update(1e-2)
    state = copy.deepcopy(one.state())
    other = TrainingStep(drafter(seed=5), SETTINGS, CPU)
    other.add(frozen(), batch, 2)  # gradients that belong to other weights
    template = other.state()
    assert template["optimizer"]["state"].keys() == state["optimizer"]["state"].keys() != set()
    other.add(frozen(), batch, 2)
    other.restore(state)
    for step in (one, other):
        step.add(frozen(), batch, 2)
        step.add(frozen(), batch, 2)
        assert step.is_complete
        step.update(1e-2)
    assert_equal(one.drafter, other.drafter)
