"""The one message that a worker hands to the judge: fixed in form, limited in size, complete or nothing.

    8 bytes: length of the header    header: JSON    the workloads' traced programs, one after the other

The header is {"status": …, "reason": …, "workloads": {name: {"tree": …, "bytes": …}}}. It comes through a pipe that
nothing else is written to. Whatever else arrives is no message.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 256 << 20
MAX_REASON = 4000
MAX_TREE = 10_000


class ChannelError(Exception):
    """What came is not one message of the worker's."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What the worker reports: a status, and for PASS every workload's output tree and traced program."""

    status: str
    reason: str = ""
    trees: Mapping[str, str]
    programs: Mapping[str, bytes]


def send(descriptor: int, message: Message) -> None:
    """Writes the message and closes the pipe."""
    workloads = {n: {"tree": message.trees[n], "bytes": len(data)} for n, data in message.programs.items()}
    header = json.dumps({"status": message.status, "reason": message.reason[:MAX_REASON], "workloads": workloads})
    encoded = header.encode(errors="replace")
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(struct.pack("<Q", len(encoded)) + encoded + b"".join(message.programs.values()))


def receive(descriptor: int) -> bytes:
    """Everything up to the end of the pipe, or one byte more than a message may have."""
    parts, size = [], 0
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while size <= MAX_MESSAGE_BYTES and (part := pipe.read(1 << 20)):
            parts.append(part)
            size += len(part)
    return b"".join(parts)


def parse(data: bytes, names: list[str]) -> Message:
    """The message, for exactly these workloads. Raises ChannelError."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ChannelError(f"more than {MAX_MESSAGE_BYTES} bytes came")
    (size,) = struct.unpack("<Q", data[:8]) if len(data) >= 8 else (0,)
    if not 0 < size <= min(MAX_HEADER_BYTES, len(data) - 8):
        raise ChannelError("no message came" if not data else "what came is no message")
    try:
        header = json.loads(data[8 : 8 + size])
        status, reason, workloads = header["status"], header["reason"], header["workloads"]
        if not isinstance(status, str) or not isinstance(reason, str) or not isinstance(workloads, dict):
            raise TypeError("status, reason or workloads")
        sizes = {name: workloads[name]["bytes"] for name in (names if status == "PASS" else ())}
        trees = {name: workloads[name]["tree"] for name in sizes}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ChannelError("the message is not of the known form") from None
    if not all(type(n) is int and n > 0 for n in sizes.values()) or not all(isinstance(t, str) for t in trees.values()):
        raise ChannelError("the message is not of the known form")
    if list(workloads) != list(sizes) or 8 + size + sum(sizes.values()) != len(data) or len(reason) > MAX_REASON:
        raise ChannelError("the message is not of the known form")
    if any(len(tree) > MAX_TREE for tree in trees.values()):
        raise ChannelError("the description of the outputs is too long")
    programs, at = {}, 8 + size
    for name, count in sizes.items():
        programs[name] = data[at : at + count]
        at += count
    return Message(status=status, reason=reason, trees=trees, programs=programs)
