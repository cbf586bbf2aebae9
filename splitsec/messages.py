"""Tensors to message and back: a msgpack header, then the raw buffers, one after another.

Here: the layout (docs/protocol.md, "Messages") and every check that a message can be given without knowing what it is
for. Not here: whether it may leave or enter (``guard``), how it travels (``splitsec.transports``). Next: ``guard``
calls both functions; ``transports/channel.py`` carries what they make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import torch

__all__ = ["BadMessage", "Message", "decode", "encode", "finite"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "float32": torch.float32,
    "int64": torch.int64,
    "float64": torch.float64,
}
NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in DTYPES.items()}

ALIGNMENT: Final = 64
"""Bytes.  Vector kernels may round differently on memory that is aligned differently; equal to torch's own allocator.
"""

MOST_DIMENSIONS: Final = 16
MOST_TENSORS: Final = 65_536


class BadMessage(ValueError):
    """Bytes that are not a message of ours.  ``guard`` turns it into an error that names the peer."""


@dataclass(frozen=True)
class Message:
    """What a party says to another.  ``kind`` repeats the lane's; ``key`` places it: (phase, step, micro-batch)."""

    kind: str
    key: tuple[int, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


def encode(message: Message) -> tuple[bytes, list[memoryview]]:
    """Header and body buffers of ``message``.  The buffers are lent: they share the tensors' memory where it is
    contiguous.
    """
    described = []
    buffers = []
    for name, tensor in message.tensors.items():
        flat = tensor.detach().cpu().contiguous()
        described.append([name, NAMES[flat.dtype], list(flat.shape)])
        if flat.numel():
            buffers.append(flat.view(-1).view(torch.uint8).numpy().data)
    header = msgpack.packb([message.kind, list(message.key), dict(message.facts), described], use_bin_type=True)
    return header, buffers


def decode(header: bytes, body: memoryview) -> Message:
    """The message that ``header`` and ``body`` hold; its tensors share ``body``'s memory.

    Raises ``BadMessage`` on anything but exactly one well-formed message that uses up the whole body.
    """
    try:
        unpacked = msgpack.unpackb(header, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadMessage("the header is not msgpack") from error
    match unpacked:
        case [str() as kind, list() as key, dict() as facts, list() as described]:
            pass
        case _:
            raise BadMessage("the header is not [kind, key, facts, tensors]")
    if not all(type(part) is int and 0 <= part < 2**63 for part in key):
        raise BadMessage("the key is not a list of counts")
    if len(described) > MOST_TENSORS:
        raise BadMessage(f"{len(described)} tensors in one message")
    tensors: dict[str, torch.Tensor] = {}
    offset = 0
    for item in described:
        match item:
            case [str() as name, str() as dtype_name, list() as shape] if (
                name not in tensors
                and dtype_name in DTYPES
                and len(shape) <= MOST_DIMENSIONS
                and all(type(extent) is int and 0 <= extent < 2**40 for extent in shape)
            ):
                pass
            case _:
                raise BadMessage("a tensor is not described as [name, dtype, shape]")
        dtype = DTYPES[dtype_name]
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size > len(body) - offset:
            raise BadMessage("the body is shorter than its tensors")
        tensors[name] = _tensor(body[offset : offset + size], dtype, count, shape)
        offset += size
    if offset != len(body):
        raise BadMessage("the body is longer than its tensors")
    return Message(kind, tuple(key), facts, tensors)


def _tensor(raw: memoryview, dtype: torch.dtype, count: int, shape: Sequence[int]) -> torch.Tensor:
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    if dtype is torch.bool:
        flat = flat.ne(0).view(torch.uint8)
    return flat.view(dtype).view(tuple(shape))


def finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite.  One pass in the common case: the sum of finite numbers is finite, or too
    large.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
