"""The coordinator's messages: all survive encoding, and nothing malformed gets in."""

from __future__ import annotations

import random

import pytest

from tests.support.coordination import MALFORMED
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.messages import (
    Freed,
    Hello,
    Kill,
    Load,
    Signal,
    Start,
    Stop,
    Training,
)


def test_every_message_survives_encoding() -> None:
    for message in (
        Hello("e", "engine", "cpu:0-1"),
        Load(1, 2, 3.5),
        Training(7, True),
        messages.Ping(),
        Signal("claim_device", "cpu:0"),
        messages.Bye(),
        messages.StatusRequest(),
    ):
        assert messages.decode_member_message(messages.encode(message)) == message
    for reply in (
        messages.Welcome("x", 5.0),
        messages.Refused("no"),
        messages.Unknown(),
        messages.Pong(),
        Start(1),
        Stop(2, 500, True),
        Kill(2, "t", "cpu:0"),
        Freed("cpu:0"),
        messages.Status({"cpu:0": "IDLE"}, {"t": "trainer"}, 1.0, 0, 0, [1.5]),
    ):
        assert messages.decode_coordinator_message(messages.encode(reply)) == reply


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_decodes_to_none(data: bytes) -> None:
    assert messages.decode_member_message(data) is None


def test_no_bytes_make_the_decoders_raise() -> None:
    dice = random.Random(0)
    good = messages.encode(Hello("engine", "engine", "cpu:0"))
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        for read in (messages.decode_member_message, messages.decode_coordinator_message):
            read(bytes(bad[: dice.randint(0, len(bad))]))
