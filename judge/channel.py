"""The one message that a worker hands to the judge: fixed in form, limited in size, complete or nothing.

    8 bytes: length of the header    header: JSON    the traced program

The header is {"status": …, "reason": …, "tree": …, "bytes": …}, with the program's size; only with PASS is there one.
It comes through a pipe that nothing else is written to. Whatever else arrives is no message.
"""

import json
import os
import struct
from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 256 << 20
MAX_REASON = 4000
MAX_TREE = 10_000


class ChannelError(Exception):
    """What came is not one message of the worker's."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What the worker reports: a status, and for PASS the workload's output tree and traced program."""

    status: str
    reason: str = ""
    tree: str = ""
    program: bytes = b""


def send(descriptor: int, message: Message) -> None:
    """Writes the message and closes the pipe."""
    told = {"status": message.status, "reason": message.reason[:MAX_REASON], "tree": message.tree}
    encoded = json.dumps(told | {"bytes": len(message.program)}).encode(errors="replace")
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(struct.pack("<Q", len(encoded)) + encoded + message.program)


def receive(descriptor: int) -> bytes:
    """Everything up to the end of the pipe, or one byte more than a message may have."""
    parts, size = [], 0
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while size <= MAX_MESSAGE_BYTES and (part := pipe.read(1 << 20)):
            parts.append(part)
            size += len(part)
    return b"".join(parts)


def parse(data: bytes) -> Message:
    """Raises ChannelError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ChannelError(f"more than {MAX_MESSAGE_BYTES} bytes came")
    (size,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if not 0 < size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ChannelError("no message came" if not data else "what came is no message")
    try:
        header = json.loads(data[8 : 8 + size])
        told = {name: header.pop(name) for name in ("status", "reason", "tree")}
        count = header.pop("bytes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ChannelError("the message is not of the known form") from None
    program = data[8 + size :]
    if header or not all(isinstance(text, str) for text in told.values()) or len(told["reason"]) > MAX_REASON:
        raise ChannelError("the message is not of the known form")
    if type(count) is not int or count != len(program) or bool(count) != (told["status"] == "PASS"):
        raise ChannelError("the message is not of the known form")
    if len(told["tree"]) > MAX_TREE:
        raise ChannelError("the description of the outputs is too long")
    return Message(**told, program=program)
