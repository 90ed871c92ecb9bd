"""The drafter's training pass: packed or alone, simulated or decoded, it is the same."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tests.support.learning import SIZE, drafter, frozen, sequences
from tlt_sglang.harvest.sequence import TokenSequence
from tlt_sglang.sampling.ranking import DRAFT_TEMPERATURE
from tlt_sglang.training.attention import attend
from tlt_sglang.training.batches import PackedBatch, pack
from tlt_sglang.training.evaluate import AcceptLength, accept_length, noise_given_choice
from tlt_sglang.training.losses import (
    CLASSIFICATION_WEIGHT,
    LK_DECAY,
    feature_regression,
    lk_loss,
    soft_cross_entropy,
    step_weights,
)
from tlt_sglang.training.models import Algorithm, DraftContext
from tlt_sglang.training.simulate import loss_of, simulate

BOTH: list[Algorithm] = ["eagle3", "eagle"]


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_attention_is_torchs_with_a_mask(steps: int) -> None:
    """Against scaled_dot_product_attention over all keys of all steps, and a mask that says who."""
    lengths, heads, kv_heads, dim = [5, 1, 8], 4, 2, 6
    tokens = sum(lengths)
    torch.manual_seed(0)
    q = torch.randn(tokens, heads, dim, requires_grad=True)
    keys = [torch.randn(tokens, kv_heads, dim) for _ in range(steps)]
    values = [torch.randn(tokens, kv_heads, dim) for _ in range(steps)]
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    causal = (sequence[:, None] == sequence) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    own = torch.eye(tokens, dtype=torch.bool)
    mask = torch.cat([causal] + [own] * (steps - 1), dim=1)
    expected = functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        torch.cat(keys).transpose(0, 1),
        torch.cat(values).transpose(0, 1),
        attn_mask=mask,
        enable_gqa=True,
    ).transpose(0, 1)
    got = attend(q, keys, values, lengths)
    torch.testing.assert_close(got, expected)
    gradient = torch.autograd.grad(expected.square().sum(), q)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), q), gradient)


# ---- packing -------------------------------------------------------------------------------------


def gradients(
    algorithm: Algorithm, batches: list[list[TokenSequence[Tensor]]]
) -> tuple[float, list[Tensor]]:
    """(loss, gradients) over all batches, each weighted by what counts in it."""
    model, shared = drafter(algorithm), frozen(algorithm)
    everything = PackedBatch.of([sequence for batch in batches for sequence in batch])
    total = torch.zeros(())
    for members in batches:
        batch = PackedBatch.of(members)
        for number in range(3):
            share = _counted(batch, shared, number) / _counted(everything, shared, number)
            total = total + share * _step_loss(model, shared, batch, number)
    torch.autograd.backward(total)
    return float(total.detach()), [p.grad for p in model.parameters() if p.grad is not None]


def _counted(batch: PackedBatch, shared: object, number: int) -> float:
    index, _ = batch.shifted(2 + number)
    tokens_known = frozen_index(shared)[batch.ids[index]] >= 0
    return float((batch.counts(number) & tokens_known).sum())


def frozen_index(shared: object) -> Tensor:
    index: Tensor = shared.draft_index  # type: ignore[attr-defined]
    return index


def _step_loss(model: object, shared: object, batch: PackedBatch, number: int) -> Tensor:
    target = (batch.last @ shared.head.T).softmax(-1)  # type: ignore[attr-defined]
    for at, step in enumerate(simulate(model, shared, batch, number + 1)):  # type: ignore[arg-type]
        if at == number:
            weight = (step.counts & (step.labels >= 0)).float()
            return soft_cross_entropy(step.logits, target[step.source], weight)
    raise AssertionError(number)


@pytest.mark.parametrize("algorithm", BOTH)
def test_packed_and_unpacked_gradients_are_equal(algorithm: Algorithm) -> None:
    several = sequences([9, 14, 6, 21], algorithm)
    packed, together = gradients(algorithm, [several])
    alone, apart = gradients(algorithm, [[sequence] for sequence in several])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert len(together) > 8
    for one, other in zip(together, apart, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_sequence_does_not_see_its_neighbours() -> None:
    """A change in one sequence leaves the loss of the others as it was, to the bit."""
    model, shared = drafter(), frozen()
    first, second = sequences([9, 14])
    (other,) = sequences([9], seed=5)
    rows = []
    for neighbour in (first, other):
        batch = PackedBatch.of([neighbour, second])
        rows.append([step.logits[9:] for step in simulate(model, shared, batch, 3)])
    for one, another in zip(*rows, strict=True):
        assert torch.equal(one, another)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 64))
def test_batches_hold_every_sequence_once(lengths: list[int], budget: int) -> None:
    batches = pack(lengths, budget, seed=3, epoch=1)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    assert pack(lengths, budget, seed=3, epoch=1) == batches


def test_batches_are_full() -> None:
    """On a long-tailed mix next to nothing of the budget is left over."""
    torch.manual_seed(0)
    lengths = (4.5 + 0.8 * torch.randn(2000)).exp().clamp(8, 1000).int().tolist()
    batches = pack(lengths, 2048, seed=0, epoch=0)
    assert sum(lengths) / (2048 * len(batches)) > 0.95
    assert pack(lengths, 2048, seed=0, epoch=1) != batches


def test_positions_and_what_counts() -> None:
    batch = PackedBatch.of(sequences([6, 4]))
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    # Prompts of two tokens and of one; index i, step s predicts token i + 2 + s of its sequence.
    assert batch.counts(0).tolist() == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2
    assert batch.counts(2).tolist() == [True] * 2 + [False] * 8


# ---- the simulated draft -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", BOTH)
def test_simulation_is_decoding(algorithm: Algorithm) -> None:
    """Each step at one index, against a plain loop that feeds the drafter token by token."""
    model, shared = drafter(algorithm), frozen(algorithm)
    (sequence,) = sequences([12], algorithm)
    batch = PackedBatch.of([sequence])
    steps = [step.logits for step in simulate(model, shared, batch, 4)]
    at = 5
    # A loop that decodes: true features up to `at`, then the drafter's own output, all in one
    # sequence with plain causal attention.
    hidden = model.fc(sequence.features) if algorithm == "eagle3" else sequence.features
    hidden = hidden[: at + 1]
    for number, simulated in enumerate(steps):
        count = at + 1 + number
        embeds = shared.embedding[sequence.ids[1 : count + 1]]
        context = DraftContext.of([count], torch.arange(count))
        out, after = model(embeds, hidden, context)
        torch.testing.assert_close(out[-1] @ shared.head.T, simulated[at])
        hidden = torch.cat([hidden, after[-1:]])


def test_an_eagle_loss_is_made_of_both_parts() -> None:
    model, shared = drafter("eagle"), frozen("eagle")
    batch = PackedBatch.of(sequences([9, 7], "eagle"))
    (step,) = simulate(model, shared, batch, 1, batch.counts(0).nonzero().flatten())
    weight = step.counts.float()
    target = (batch.last @ shared.head.T).softmax(-1)[step.source]
    expected = feature_regression(
        step.hidden, batch.last[step.source], weight
    ) + CLASSIFICATION_WEIGHT * soft_cross_entropy(step.logits, target, weight)
    torch.testing.assert_close(loss_of(model, shared, batch, 1).total, expected)


# ---- losses --------------------------------------------------------------------------------------


def test_soft_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, weight = torch.randn(4, 6), torch.tensor([1.0, 0.0, 1.0, 1.0])
    target = torch.randn(4, 6).softmax(-1)
    each = functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(
        soft_cross_entropy(logits, target, weight), (each[0] + each[2] + each[3]) / 3
    )
    assert float(soft_cross_entropy(logits, target, torch.zeros(4))) == 0.0


def test_lk_loss() -> None:
    """Against the sum over single predictions, and its gradient against that of both parts."""
    torch.manual_seed(0)
    logits, weight = torch.randn(4, 6, requires_grad=True), torch.tensor([1.0, 0.0, 1.0, 1.0])
    target = (2 * torch.randn(4, 6)).softmax(-1)
    counted = [0, 2, 3]
    probs = logits.softmax(-1)
    accepted = torch.minimum(probs, target)[counted].sum() / 3
    share = math.exp(-LK_DECAY * float(accepted.detach()))
    parts = soft_cross_entropy(logits, target, weight), 1 - accepted
    loss = lk_loss(logits, target, weight)
    torch.testing.assert_close(loss, share * parts[0] + (1 - share) * parts[1])
    gradients = [torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts]
    expected = share * gradients[0] + (1 - share) * gradients[1]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    assert float(lk_loss(logits, target, torch.zeros(4)).detach()) == 0.0


def test_lk_loss_is_least_where_all_drafts_are_accepted() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(3, 6).softmax(-1), torch.ones(3)
    best = lk_loss(target.log(), target, weight)
    for _ in range(20):
        assert lk_loss(target.log() + 1e-2 * torch.randn(3, 6), target, weight) > best


def test_regression_is_in_units_of_the_features() -> None:
    torch.manual_seed(0)
    feature, weight = torch.randn(5, SIZE), torch.ones(5)
    predicted = feature + torch.randn(5, SIZE)
    unit = feature.square().mean().sqrt()
    expected = functional.smooth_l1_loss(predicted / unit, feature / unit)
    torch.testing.assert_close(feature_regression(predicted, feature, weight), expected)
    scaled = feature_regression(40 * predicted, 40 * feature, weight)
    torch.testing.assert_close(scaled, expected)


def test_steps_count_less_and_less() -> None:
    weights = step_weights(5)
    assert weights[0] == 1.0
    assert all(later == pytest.approx(0.8 * earlier) for earlier, later in pairwise(weights))


# ---- accept length -------------------------------------------------------------------------------


def test_accept_length_is_that_of_a_real_draft() -> None:
    """Against a loop that drafts, compares with the text, and goes on where it was stopped."""
    model, shared = drafter(), frozen()
    texts = _texts_it_half_knows(model, shared)
    results = accept_length(model, shared, texts, steps=3)
    assert results.verify_steps > 20
    assert 1.2 < results.mean < 3.8
    verify_steps, committed = 0, 0
    for text in texts:
        batch = PackedBatch.of([text])
        drafts = [
            shared.draft_ids[step.logits.argmax(-1)] for step in simulate(model, shared, batch, 3)
        ]
        last = text.prompt_length
        while last + 1 < len(text):
            accepted = 0
            while (
                accepted < 3
                and last + 1 + accepted < len(text)
                and drafts[accepted][last - 1] == text.ids[last + 1 + accepted]
            ):
                accepted += 1
            if last + 1 + accepted >= len(text) and accepted < 3:
                break
            verify_steps, committed = verify_steps + 1, committed + 1 + accepted
            last += 1 + accepted
    assert (results.verify_steps, results.committed) == (verify_steps, committed)


def _texts_it_half_knows(model: object, shared: object) -> list[TokenSequence[Tensor]]:
    """Random sequences in which two of three tokens are what the drafter would say."""
    texts = []
    for text in sequences([40, 60, 50]):
        ids = text.ids.clone()
        for at in range(2, len(ids)):
            if at % 3:
                batch = PackedBatch.of([TokenSequence(ids, text.features, 4, text.last)])
                (step,) = simulate(model, shared, batch, 1)  # type: ignore[arg-type]
                ids[at] = shared.draft_ids[step.logits[at - 2].argmax()]  # type: ignore[attr-defined]
        texts.append(TokenSequence(ids, text.features, 4, text.last))
    return texts


def test_wider_trees_accept_more() -> None:
    model, shared = drafter(), frozen()
    texts = _texts_it_half_knows(model, shared)
    chain = accept_length(model, shared, texts, steps=3).mean
    assert accept_length(model, shared, texts, 3, topk=1, tokens=4).mean == chain
    narrow = accept_length(model, shared, texts, 3, topk=4, tokens=8).mean
    wide = accept_length(model, shared, texts, 3, topk=8, tokens=32).mean
    assert chain < narrow <= wide


def test_sampled_texts_are_drafted_for_with_their_noise() -> None:
    """On texts that are sampled from what the target says, against the chance of a coupled draft.

    For p, q and the same Gumbel noise, both choose v with the chance 1 / sum over u of
    max(p(u) / p(v), q(u) / q(v)).
    """
    model, shared = drafter(), frozen()
    (text,) = sequences([30])
    target = _warm(functional.linear(text.head_input, shared.target_head))
    torch.manual_seed(0)
    texts, agreed = [], []
    for _ in range(150):
        ids = text.ids.clone()
        ids[2:] = shared.draft_ids[target[1:-1].multinomial(1).squeeze(-1)]
        sampled = TokenSequence(ids, text.features, 2, text.last)
        texts.append(sampled)
        with torch.no_grad():
            (step,) = simulate(model, shared, PackedBatch.of([sampled]), 1)
        probs = _warm(step.logits / DRAFT_TEMPERATURE), target
        ratios = [p.unsqueeze(-2) / p.unsqueeze(-1) for p in probs]
        both = 1 / torch.maximum(ratios[0], ratios[1][step.source]).sum(-1)
        agreed.append(both.sum(-1)[1:-2].mean())
    results = accept_length(model, shared, texts, 1, temperature=4.0)
    expected = float(torch.stack(agreed).mean())
    assert 0.1 < expected < 0.9
    assert results.mean - 1 == pytest.approx(expected, abs=0.03)


def _warm(logits: Tensor) -> Tensor:
    return (logits / 4).softmax(-1)


def test_noise_is_that_of_texts_with_their_choices() -> None:
    """Whoever chooses by free noise, and forgets all but the choice, draws noise that chose it."""
    rng = torch.Generator().manual_seed(0)
    log_p = torch.tensor([0.6, 0.3, 0.1]).log().expand(40_000, 3)
    free = -torch.empty_like(log_p.contiguous()).exponential_(generator=rng).log()
    chosen = (log_p + free).argmax(-1)
    noise = noise_given_choice(log_p, chosen, rng)
    assert torch.equal((log_p + noise).argmax(-1), chosen)
    # The noise as a whole is distributed as it was: mean, variance, and independent columns.
    torch.testing.assert_close(noise.mean(0), torch.full((3,), 0.5772), atol=0.03, rtol=0)
    expected = torch.eye(3) * math.pi**2 / 6
    torch.testing.assert_close(noise.T.cov(), expected, atol=0.06, rtol=0)


def test_accept_length_counts() -> None:
    results = AcceptLength()
    assert results.mean == 1.0
    for accepted in (0, 3, 1):
        results.add(accepted)
    assert (results.verify_steps, results.committed, results.depth_hits) == (3, 7, [2, 1, 1])
