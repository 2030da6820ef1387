"""judge/channel.py: one message, whole and of the known form, or none."""

import json
import os
import struct

import pytest

from judge import channel

GOOD = channel.Message(status="PASS", tree="*", program=b"one")


def sent(message: channel.Message) -> bytes:
    reading, writing = os.pipe()
    channel.send(writing, message)
    return channel.receive(reading)


def raw(header: object, rest: bytes = b"") -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + rest


def test_what_is_sent_arrives():
    assert channel.parse(sent(GOOD)) == GOOD
    failure = channel.Message(status="FAIL_CRASH", reason="no such tile")
    assert channel.parse(sent(failure)) == failure


def test_a_long_reason_is_cut():
    failure = channel.Message(status="FAIL_CRASH", reason="x" * 10**6)
    assert channel.parse(sent(failure)).reason == "x" * channel.MAX_REASON


PASSED = {"status": "PASS", "reason": "", "tree": "*", "bytes": 3}
FAILED = PASSED | {"status": "FAIL_CRASH"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        b"RESULT: score=1e9\n",
        struct.pack("<Q", 1 << 60) + b"{}",
        raw(b"not json"),
        raw(b"[" * 100_000),
        raw([]),
        raw({"status": "PASS"}),
        raw(PASSED),
        raw(PASSED, b"on"),
        raw(PASSED, b"one more"),
        raw(PASSED | {"bytes": 3.0}, b"one"),
        raw(PASSED | {"bytes": True}, b"o"),
        raw(PASSED | {"bytes": 0}),
        raw(PASSED | {"bytes": -3}),
        raw(FAILED, b"one"),
        raw(PASSED | {"status": ["PASS"]}, b"one"),
        raw(PASSED | {"tree": None}, b"one"),
        raw(PASSED | {"tree": "x" * 20_000}, b"one"),
        raw(PASSED | {"reason": "x" * 5000}, b"one"),
        raw(PASSED | {"more": ""}, b"one"),
        sent(GOOD) + sent(GOOD),
    ],
)
def test_anything_else_is_no_message(data):
    with pytest.raises(channel.ChannelError):
        channel.parse(data)


def test_more_than_a_message_may_have_is_not_read(monkeypatch):
    monkeypatch.setattr(channel, "MAX_MESSAGE_BYTES", 1000)
    reading, writing = os.pipe()
    os.write(writing, b"x" * 5000)
    os.close(writing)
    data = channel.receive(reading)
    with pytest.raises(channel.ChannelError, match="more than 1000 bytes"):
        channel.parse(data)
