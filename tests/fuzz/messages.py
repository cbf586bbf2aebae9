"""Target: a message's header and body, from a peer with right keys who puts in them what it likes.

Here: ``splitsec.messages.decode`` on rubbish, on headers built from odd parts, and on changed honest ones.  Not here:
what the guard refuses afterwards.

The properties.  Only BadMessage comes out, and soon.  Tensors that come out hold as many bytes as the body has, not one
more, whatever shape they claim; those that share memory lie in the body.  What came out goes in again, and comes out
the same.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgpack
import torch

from splitsec.messages import ALIGNMENT, DTYPES, LARGEST_TENSOR, MOST_DIMENSIONS, BadMessage, Message, decode, encode
from splitsec.transports.limits import HEADER_MAX
from tests.fuzz.script import Script, mutated

NAMES: Final = (*DTYPES, "float8", "", "complex64")
EXTENTS: Final = (0, 1, 2, 3, 4, 7, 64, 2**16, 2**31, 2**39, 2**40 - 1, 2**40, 2**63, 2**64 - 1, -1, -(2**63))
NESTED: Final[tuple[Any, ...]] = ([], {}, [[[]]], {"a": {"b": []}}, {1: 2})
ODD: Final[tuple[Any, ...]] = (None, True, 1.5, float("nan"), -1, 2**64 - 1, "x", b"x", *NESTED)
KINDS: Final = ("activation", "gradient", "", "\U0001f600", "x" * 300)
HEADER_SIZES: Final = (0, 0, 0, 0, 0, 0, 0, 1000, 1 << 16, HEADER_MAX)  # bytes, at least

torch.set_num_threads(1)

_TENSORS: Final[tuple[dict[str, torch.Tensor], ...]] = (
    {},
    {"": torch.arange(6.0).view(2, 3)},
    {"": torch.arange(6.0).view(2, 3).t(), "m": torch.tensor([True, False])},
    {"": torch.tensor(2.5, dtype=torch.bfloat16).expand(4, 5)},
    {"w": torch.arange(24, dtype=torch.int64).view(1, 2, 3, 4).permute(0, 3, 1, 2), "e": torch.empty(0, 3)},
    {str(number): torch.full((number,), number, dtype=torch.uint8) for number in range(20)},
)
_HONEST: Final = tuple(
    (header, b"".join(buffers))
    for tensors in _TENSORS
    for header, buffers in [encode(Message("activation", (1, 2), {"so": "on", "n": [1, None]}, tensors))]
)

SEEDS: Final = (
    *(bytes([0, which]) for which in range(len(_HONEST))),
    *(bytes([1, which]) for which in range(len(_HONEST))),
    bytes([2, 0, 0, 0, 1, 0, 5, 2, 2, 3, 0, 30]),
    bytes([2, 0, 0, 0, 1, 1, 5, 2, 2, 3, 1, 1, 3, 0, 30]),
    bytes([2, 0, 0, 0, 2, 0, 0, 1, 3, 0, 1, 4, 2, 10, 1, 1, 3, 3, 3, 0, 0, 9]),
    b"\3\0\0\xdd\xff\xff\xff\xff",
    b"\3\0\0" + b"\x94\xa1k\x90\x80" + b"\xdd\x00\x00\xff\xf0" * 40,
    b"\3\x09\0" + b"\x94\xa1k\x90\x80" + b"\xdd\x00\x0f\xff\xf0" * 600,  # lists that claim more than they hold
    b"\3\0\0" + b"\x94\xa1k\x90" + b"\x81\xa1a" * 600 + b"\x80\x90",
)


def messages(data: bytes) -> None:
    """One message."""
    script = Script(data)
    honest = False
    match script.below(4):
        case 0:
            header, body = script.choose(_HONEST)
            honest = not script.flag()
            if not honest:
                body = mutated(script, body, body[::-1])
        case 1:
            header, body = script.choose(_HONEST)
            for _ in range(1 + script.below(3)):
                header = mutated(script, header, _HONEST[-1][0])
        case 2:
            header, body = _built(script)
        case _:
            size = script.choose(HEADER_SIZES)
            body = bytes(script.byte())
            header = script.rest().ljust(size, b"\0")
    _decode(header, body, honest)


def _decode(header: bytes, body: bytes, honest: bool) -> None:
    view = _aligned(body)
    try:
        message = decode(header, view)
    except BadMessage:
        assert not honest
        return
    assert isinstance(message.kind, str)
    assert all(type(part) is int and 0 <= part < 2**63 for part in message.key)
    assert type(message.facts) is dict
    start = torch.frombuffer(view, dtype=torch.uint8).data_ptr() if body else 0
    used = 0
    for tensor in message.tensors.values():
        assert tensor.dtype in DTYPES.values()
        assert tensor.dim() <= MOST_DIMENSIONS
        assert tensor.numel() * tensor.element_size() <= LARGEST_TENSOR
        if not tensor.numel():
            assert tensor.untyped_storage().nbytes() == 0
            continue
        size = (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * (
            tensor.element_size()
        )
        assert size <= tensor.untyped_storage().nbytes(), "a tensor beyond its memory"
        assert tensor.storage_offset() == 0
        assert tensor.data_ptr() % ALIGNMENT == 0
        at = tensor.data_ptr() - start
        if 0 <= at < len(body):
            assert at == used, "a tensor that begins where another lies"
            assert at + size <= len(body), "a tensor beyond the body"
        else:
            assert tensor.untyped_storage().nbytes() <= len(body), "more memory than came"
        used += size
    assert used == len(body), "a body that was not used up"
    again, buffers = encode(message)
    joined = b"".join(buffers)
    assert len(joined) == len(body), "what came out is larger than what went in"
    second = decode(again, memoryview(bytearray(joined)))
    assert (second.kind, second.key) == (message.kind, message.key)
    assert list(second.tensors) == list(message.tensors)
    for one, other in zip(message.tensors.values(), second.tensors.values(), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        if one.numel():
            assert one.stride() == other.stride()
    _, buffers = encode(second)
    assert b"".join(buffers) == joined, "what went in again came out otherwise"


def _aligned(body: bytes) -> memoryview:
    """As the channel gives it: one writable block, the body where a tensor may lie."""
    block = bytearray(ALIGNMENT) + body
    at = -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % ALIGNMENT
    block[at : at + len(body)] = body
    return memoryview(block)[at : at + len(body)]


def _built(script: Script) -> tuple[bytes, bytes]:
    """A header that is nearly right, and a body that may fit it."""
    kind = _or_odd(script, lambda: script.choose(KINDS))
    key = _or_odd(script, lambda: [_or_odd(script, lambda: script.choose(EXTENTS)) for _ in range(script.below(4))])
    facts = _or_odd(script, lambda: {})
    described = [_or_odd(script, lambda: _tensor(script)) for _ in range(script.below(5))]
    parts: list[Any] = [kind, key, facts, _or_odd(script, lambda: described)]
    header = msgpack.packb(parts[: 4 - script.below(2) * script.below(2)], use_bin_type=True)
    return header, (script.take(16) * 4096)[: script.below(300)]


def _tensor(script: Script) -> list[Any]:
    shape = [_extent(script) for _ in range(script.below(5))]
    if script.below(16) == 15:
        shape = shape * 6
    item = [_or_odd(script, lambda: chr(97 + script.below(3))), _or_odd(script, lambda: script.choose(NAMES)), shape]
    match script.below(4):
        case 0 | 1:
            pass
        case 2:
            item.append(_strides(script, shape))
        case _:
            item.append([_extent(script) for _ in shape])
    if script.below(16) == 15:
        item.append(_odd(script))
    return item


def _strides(script: Script, shape: list[Any]) -> list[Any]:
    """Those of a tensor laid out in some order, with some dimensions that only repeat."""
    strides = [0] * len(shape)
    step = 1
    for place in sorted(range(len(shape)), key=lambda place: script.byte()):
        if script.below(4):
            strides[place] = step
            step *= shape[place] if type(shape[place]) is int and 0 < shape[place] < 2**40 else 1
    return [min(stride, 2**63) for stride in strides]


def _extent(script: Script) -> Any:
    return _or_odd(script, lambda: script.choose(EXTENTS[:6]) if script.below(4) else script.choose(EXTENTS))


def _or_odd(script: Script, usual: Any) -> Any:
    return _odd(script) if script.below(64) == 63 else usual()


def _odd(script: Script) -> Any:
    """Something of a wrong type, now and then deep or as long as can be claimed."""
    which = script.below(len(ODD) + 2)
    if which < len(ODD):
        return ODD[which]
    if which == len(ODD):
        deep: Any = []
        for _ in range(script.below(300)):
            deep = [deep]
        return deep
    return msgpack.ExtType(script.below(128), struct.pack(">I", script.byte()))
