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

__all__ = ["BadMessage", "Message", "decode", "encode", "finite", "row_major", "stored"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
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
LARGEST_TENSOR: Final = 2**42
"""Bytes that a tensor may unfold to.  Lanes bound it much lower; this keeps sizes within what torch can count."""


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
    """Header and body buffers of ``message``.  The buffers are lent: they share the tensors' memory where that has no
    gaps.
    """
    described = []
    buffers = []
    for name, tensor in message.tensors.items():
        laid = tensor.detach().cpu()
        if (count := stored(laid.shape, laid.stride())) is None:
            laid = laid.contiguous()
            count = laid.numel()
        shape, strides = list(laid.shape), list(laid.stride())
        described.append([name, NAMES[laid.dtype], shape, *([] if strides == row_major(shape) else [strides])])
        if count:
            buffers.append(laid.as_strided((count,), (1,)).view(torch.uint8).numpy().data)
    header = msgpack.packb([message.kind, list(message.key), dict(message.facts), described], use_bin_type=True)
    return header, buffers


def decode(header: bytes, body: memoryview) -> Message:
    """The message that ``header`` and ``body`` hold; its tensors share ``body``'s memory.

    Raises ``BadMessage`` on anything but exactly one well-formed message that uses up the whole body.
    """
    try:
        unpacked = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_array_len=MOST_TENSORS,  # lists are made as long as they claim to be
            max_map_len=MOST_TENSORS,
            max_ext_len=0,
            ext_hook=_no_extension,
        )
    except (ValueError, MemoryError, msgpack.UnpackException) as error:
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
            case [str() as name, str() as dtype_name, list() as shape, *laid] if (
                name not in tensors
                and dtype_name in DTYPES
                and len(shape) <= MOST_DIMENSIONS
                and all(type(extent) is int and 0 <= extent < 2**40 for extent in shape)
            ):
                pass
            case _:
                raise BadMessage("a tensor is not described as [name, dtype, shape] or [name, dtype, shape, strides]")
        dtype = DTYPES[dtype_name]
        strides = _strides(shape, laid)
        count = stored(shape, strides)
        if count is None:
            raise BadMessage("the strides of a tensor leave gaps or overlap")
        if math.prod(extent or 1 for extent in shape) * dtype.itemsize > LARGEST_TENSOR:
            raise BadMessage(f"a tensor of more than {LARGEST_TENSOR} bytes")
        size = count * dtype.itemsize
        if size > len(body) - offset:
            raise BadMessage("the body is shorter than its tensors")
        tensors[name] = _tensor(body[offset : offset + size], dtype, shape, strides)
        offset += size
    if offset != len(body):
        raise BadMessage("the body is longer than its tensors")
    return Message(kind, tuple(key), facts, tensors)


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("msgpack extension types have no place here")


def row_major(shape: Sequence[int]) -> list[int]:
    """The strides of a tensor of ``shape`` whose last dimension lies closest together, in elements."""
    strides = [1] * len(shape)
    for place in range(len(shape) - 1, 0, -1):
        strides[place - 1] = strides[place] * max(shape[place], 1)
    return strides


def _strides(shape: Sequence[int], laid: Sequence[Any]) -> list[int]:
    """The strides that a header gives (``laid``: none, or one list), in elements; row by row where it gives none."""
    match laid:
        case []:
            return row_major(shape)
        case [list() as strides] if len(strides) == len(shape):
            if all(type(stride) is int and 0 <= stride < 2**40 for stride in strides):
                return strides
    raise BadMessage("the strides of a tensor are not one for each dimension")


def stored(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """How many elements memory holds for ``shape`` laid out by ``strides``: all, or fewer where a dimension only
    repeats them (stride 0).  None where they do not lie one after another, each once.

    The layout travels with the numbers: kernels add up in the order of memory, so that the same numbers laid out in
    another way may differ in the last bit after the next operation.
    """
    if 0 in shape:
        return 0
    count = 1
    for stride, extent in sorted(zip(strides, shape, strict=True)):
        if stride and extent > 1:
            if stride != count:
                return None
            count *= extent
    return count


def _tensor(raw: memoryview, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]) -> torch.Tensor:
    if not raw.nbytes:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % ALIGNMENT:
        flat = flat.clone()
    if dtype is torch.bool:
        flat = flat.ne(0).view(torch.uint8)
    return flat.view(dtype).as_strided(tuple(shape), tuple(strides))


def finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite.  One pass in the common case: the sum of finite numbers is finite, or too
    large.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
