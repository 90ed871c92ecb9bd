"""Packed linear layers: right, row-invariant, and never older than their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tlt_sglang.cpu import head, linear


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 16, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (64, 1536), (33, 17)])
@pytest.mark.parametrize("biased", [False, True])
def test_against_torch(rows: int, outputs: int, inputs: int, biased: bool) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    bias = torch.randn(outputs) if biased else None
    expected = torch.nn.functional.linear(x.double(), weight.double(), None).float()
    expected = expected if bias is None else expected + bias
    linear.repack(weight)
    assert linear.packed(weight)
    for result in (linear.linear(x, weight, bias), linear.product(weight, bias)(x)):
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=1e-4)
    linear.forget(weight)
    torch.testing.assert_close(linear.linear(x, weight, bias), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("inputs", [64, 576, 1536])
def test_a_row_does_not_depend_on_its_neighbours(inputs: int) -> None:
    weight, x = torch.randn(192, inputs), torch.randn(29, inputs)
    linear.repack(weight)
    product = linear.product(weight, None)
    whole = product(x)
    for rows in (1, 2, 4, 8, 12, 13):
        assert torch.equal(product(x[:rows].contiguous()), whole[:rows])
        assert torch.equal(linear.linear(x[:rows].contiguous(), weight, None), whole[:rows])
    linear.forget(weight)


@pytest.mark.parametrize("half", [32, 64, 1536, 40])  # of the last there are no whole blocks
@pytest.mark.parametrize("how", ["packed", "narrow", "biased", "plain"])
def test_an_mlps_first_half(half: int, how: str) -> None:
    torch.manual_seed(half)
    weight, x = torch.randn(2 * half, 96) / 4, torch.randn(21, 96)
    bias = torch.randn(2 * half) if how == "biased" else None
    if how != "plain":
        linear.repack(weight)
    if how == "narrow":
        linear.narrow([weight])
    gated = linear.gated(weight, bias)
    gate, up = linear.linear(x, weight, bias).chunk(2, dim=-1)
    whole = torch.full((21, half), torch.nan)
    gated(x, whole)
    torch.testing.assert_close(whole, torch.nn.functional.silu(gate) * up, atol=1e-5, rtol=1e-5)
    for rows in (1, 2, 3, 8, 13):
        part = torch.empty(rows, half)
        gated(x[:rows].contiguous(), part)
        if how in ("packed", "narrow") and half % 32 == 0:
            assert torch.equal(part, whole[:rows])
        torch.testing.assert_close(part, whole[:rows])
    linear.forget(weight)


def test_a_changed_weight_is_noticed() -> None:
    weight, x = torch.randn(32, 48), torch.randn(4, 48)
    linear.repack(weight)
    before = linear.generation()
    weight.mul_(2.0)
    linear.repack(weight)
    assert linear.generation() > before
    torch.testing.assert_close(
        linear.linear(x, weight, None), torch.nn.functional.linear(x, weight), atol=1e-4, rtol=1e-4
    )
    linear.forget(weight)
    assert not linear.packed(weight)


def test_tied_weights_share_a_pack() -> None:
    weight = torch.randn(32, 48)
    linear.repack(weight)
    assert linear.packed(weight.detach())
    assert not linear.packed(weight[:16])
    linear.forget(weight)


def test_weights_that_cannot_be_packed_are_multiplied_plainly() -> None:
    weight, x = torch.randn(32, 48, dtype=torch.float64), torch.randn(4, 48, dtype=torch.float64)
    assert not linear.packable(weight)
    linear.repack(weight)
    assert not linear.packed(weight)
    assert torch.equal(linear.linear(x, weight, None), torch.nn.functional.linear(x, weight))


def _in_eight_bits(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 multiples of a row's 127th part."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scales).round() * scales


def test_a_drafters_weights_are_packed_in_eight_bits_and_stay_so() -> None:
    """Until they are forgotten they follow the weight, in eight bits."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(5, 64)
    linear.narrow([weight])
    assert not linear.packed(weight)  # what SGLang has not packed is left alone
    for _ in range(2):
        linear.repack(weight)
        linear.narrow([weight])
        expected = torch.nn.functional.linear(x, _in_eight_bits(weight), bias)
        for rows in (1, 5):
            for result in (
                linear.linear(x[:rows], weight, bias),
                linear.product(weight, bias)(x[:rows]),
            ):
                assert result.dtype == torch.float32
                torch.testing.assert_close(result, expected[:rows], atol=1e-5, rtol=1e-5)
                assert not torch.equal(result, torch.nn.functional.linear(x[:rows], weight, bias))
        weight.mul_(-2)
    linear.forget(weight)
    assert not linear.packed(weight)


def test_an_eight_bit_weight_is_packed_again() -> None:
    weight = torch.randn(32, 48)
    linear.repack(weight)
    linear.narrow([weight])
    linear.forget(weight)
    weight.mul_(2)
    linear.renew()
    assert linear.packed(weight)
    expected = torch.nn.functional.linear(torch.eye(48), _in_eight_bits(weight))
    torch.testing.assert_close(linear.linear(torch.eye(48), weight, None), expected)
    linear.forget(weight)


def test_zero_rows_give_zero_rows() -> None:
    weight = torch.randn(32, 48)
    linear.repack(weight)
    assert linear.linear(torch.empty(0, 48), weight, None).shape == (0, 32)
    linear.forget(weight)


def test_an_output_of_zeros_stays_zero_in_eight_bits() -> None:
    weight = torch.randn(40, 48)
    weight[7] = 0
    linear.repack(weight)
    linear.narrow([weight])
    result = linear.linear(torch.randn(3, 48), weight, None)
    assert torch.equal(result[:, 7], torch.zeros(3)) and result.isfinite().all()
    linear.forget(weight)


# ---- the target's head ---------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [32, 4096, 4100])  # of the last not all blocks are full
def test_the_most_likely_tokens_come_with_the_logits(outputs: int) -> None:
    torch.manual_seed(outputs)
    weight = torch.randn(outputs, 48)
    linear.repack(weight)
    for rows in (1, 2, 12, 13, 40, head.MAX_ROWS + 1):
        x = torch.randn(rows, 48).round_()
        x[rows // 2] = 0  # all alike: the first of them
        x[rows // 3, 5] = torch.nan
        logits = head.logits(x, weight, greedy=True)
        has_argmax = outputs != 4100 and rows <= head.MAX_ROWS
        assert (head._argmax is not None) == has_argmax
        assert torch.equal(logits.nan_to_num(7.0), linear.linear(x, weight, None).nan_to_num(7.0))
        assert torch.equal(head.most_likely(logits[:, :]), logits.argmax(-1))
        assert head._logits is None  # no logits are kept
        assert torch.equal(head.most_likely(logits), logits.argmax(-1))
    linear.forget(weight)


@pytest.mark.parametrize(
    "other", [lambda x: -x, lambda x: x[:2], lambda x: x[:, :40], lambda x: x.clone().neg_()]
)
def test_other_logits_have_other_tokens(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weight, x = torch.randn(64, 48), torch.randn(3, 48)
    linear.repack(weight)
    logits = other(head.logits(x, weight, greedy=True))
    assert torch.equal(head.most_likely(logits), logits.argmax(-1))
    linear.forget(weight)


def test_changed_logits_have_other_tokens() -> None:
    weight, x = torch.randn(64, 48), torch.randn(3, 48)
    linear.repack(weight)
    logits = head.logits(x, weight, greedy=True)
    logits.neg_()
    head.invalidate()
    assert torch.equal(head.most_likely(logits), logits.argmax(-1))
    unasked = head.logits(x, weight, greedy=False).neg_()
    assert torch.equal(head.most_likely(unasked), unasked.argmax(-1))
    linear.forget(weight)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_new_pack_takes_the_memory_of_the_old_one(narrow: bool) -> None:
    """An update of the weights allocates nothing: the heap of a long run would grow."""
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    linear.repack(weight)
    if narrow:
        linear.narrow([weight])
    try:
        blocks = linear._packs[weight.data_ptr()].packed.blocks.data_ptr()
        linear.forget(weight)
        assert not linear.packed(weight)
        weight.mul_(2)
        linear.repack(weight)
        assert linear._packs[weight.data_ptr()].packed.blocks.data_ptr() == blocks
        error = (linear.linear(x, weight, None) - x @ weight.T).abs().max()
        assert error < (0.3 if narrow else 1e-4)
    finally:
        linear.forget(weight)
        linear._narrowed.pop(weight.data_ptr(), None)
        linear._unused.pop(weight.data_ptr())
