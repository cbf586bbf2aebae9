"""Tensors become bytes and the same tensors again; bytes that are no message of ours are refused, whatever they are."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.messages import ALIGNMENT, DTYPES, MOST_TENSORS, BadMessage, Message, decode, encode, finite


def joined(buffers: list[memoryview]) -> memoryview:
    """The body as it arrives: one writable block."""
    return memoryview(bytearray(b"".join(buffers)))


def again(message: Message) -> Message:
    header, buffers = encode(message)
    return decode(header, joined(buffers))


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Every bit pattern may occur: NaN, infinities and negative zero, too."""
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    return raw[..., 0] > 127 if dtype is torch.bool else raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("name", DTYPES)
def test_a_tensor_of_each_dtype_returns_to_the_last_bit(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    tensor = sample(DTYPES[name], shape)
    message = Message("activation", (3, 1), {"so": "on"}, {"": tensor})
    found = again(message)
    assert (found.kind, found.key, dict(found.facts)) == ("activation", (3, 1), {"so": "on"})
    (returned,) = found.tensors.values()
    assert (returned.dtype, returned.shape) == (tensor.dtype, tensor.shape)
    assert bits(returned) == bits(tensor)


def test_the_layout() -> None:
    """As docs/protocol.md gives it: a msgpack header, then the raw numbers, little-endian, in order of the header."""
    tensors = {"w": torch.tensor([[1.5, -2.0]]), "n": torch.tensor([7], dtype=torch.int64)}
    header, buffers = encode(Message("weights", (4,), {"step": 9}, tensors))
    assert msgpack.unpackb(header) == ["weights", [4], {"step": 9}, [["w", "float32", [1, 2]], ["n", "int64", [1]]]]
    assert b"".join(buffers) == struct.pack("<ffq", 1.5, -2.0, 7)


def test_buffers_are_lent_in_the_order_of_memory() -> None:
    plain = torch.arange(6.0).view(2, 3)
    for tensor in (plain, plain.t()):
        _, (buffer,) = encode(Message("weights", tensors={"": tensor}))
        plain[0, 0] += 9.0
        assert bytes(buffer) == bits(plain)


IMAGES = torch.arange(120.0).view(2, 3, 4, 5)
LAID_OUT = {
    "channels last": (IMAGES.contiguous(memory_format=torch.channels_last), 120),
    "one pixel, channels last": (torch.ones(2, 3, 1, 1).contiguous(memory_format=torch.channels_last), 6),
    "turned": (IMAGES.permute(3, 0, 2, 1), 120),
    "repeated, as the gradient of a sum is": (torch.arange(6.0).view(2, 3, 1, 1).expand(2, 3, 4, 5), 6),
    "one number for all": (torch.tensor(2.5).expand(2, 3), 1),
    "none": (torch.empty(0, 3).t(), 0),
    "with an offset": (IMAGES[1], 60),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_the_layout_in_memory_travels_too(name: str) -> None:
    """Kernels add up in the order of memory, and so differ in the last bit on the same numbers laid out otherwise."""
    tensor, stored = LAID_OUT[name]
    message = Message("gradient", (0, 0), tensors={"": tensor})
    assert sum(part.nbytes for part in encode(message)[1]) == 4 * stored
    returned = again(message).tensors[""]
    assert torch.equal(returned, tensor)
    assert tensor.numel() == 0 or returned.stride() == tensor.stride()


@pytest.mark.parametrize("tensor", [IMAGES[..., ::2], IMAGES.unfold(3, 3, 1)], ids=["gaps", "overlap"])
def test_what_does_not_lie_together_travels_row_by_row(tensor: torch.Tensor) -> None:
    message = Message("gradient", (0, 0), tensors={"": tensor})
    assert sum(part.nbytes for part in encode(message)[1]) == tensor.nbytes
    returned = again(message).tensors[""]
    assert torch.equal(returned, tensor)
    assert returned.is_contiguous()


def test_gradients_do_not_travel() -> None:
    tensor = torch.ones(2, requires_grad=True) * 3
    returned = again(Message("activation", (0, 0), tensors={"": tensor})).tensors[""]
    assert not returned.requires_grad
    assert torch.equal(returned, torch.full((2,), 3.0))


def test_tensors_lie_where_torch_would_put_them() -> None:
    """Vector kernels may round differently on memory that is aligned differently."""
    tensors = {str(n): torch.randn(n) for n in (1, 3, 16, 5)}
    for tensor in again(Message("weights", tensors=tensors)).tensors.values():
        assert tensor.data_ptr() % ALIGNMENT == 0


def test_a_bool_is_0_or_1_whatever_was_sent() -> None:
    """torch takes a bool of another byte for true in some kernels and not in others."""
    header, _ = encode(Message("labels", (0, 0), tensors={"": torch.zeros(3, dtype=torch.bool)}))
    returned = decode(header, memoryview(bytearray([0, 1, 2]))).tensors[""]
    assert bits(returned) == bytes([0, 1, 1])


def header(described: object, kind: object = "activation", key: object = (0, 0), facts: object = None) -> bytes:
    packed: bytes = msgpack.packb([kind, key, {} if facts is None else facts, described])
    return packed


def stored_bytes(tensor: torch.Tensor) -> int:
    """Without what stride 0 repeats."""
    return tensor.itemsize * math.prod(
        extent for extent, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not extent
    )


FLOATS = [["", "float32", [2]]]

HOSTILE: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 0),
    "not msgpack": (b"\xc1", 0),
    "cut short": (header(FLOATS)[:-1], 8),
    "something behind it": (header(FLOATS) + b"\0", 8),
    "not a list": (msgpack.packb({"kind": "activation"}), 0),
    "too few parts": (msgpack.packb(["activation", [0, 0], {}]), 0),
    "too many parts": (msgpack.packb(["activation", [0, 0], {}, [], []]), 0),
    "a kind that is bytes": (header([], kind=b"activation"), 0),
    "a kind that is a number": (header([], kind=7), 0),
    "a key that is a text": (header([], key="00"), 0),
    "a negative key": (header([], key=[-1, 0]), 0),
    "a key beyond 63 bits": (header([], key=[2**63]), 0),
    "a key that is true": (header([], key=[True, 0]), 0),
    "a key that is a float": (header([], key=[0.0, 0]), 0),
    "facts that are a list": (header([], facts=[1]), 0),
    "facts by number": (msgpack.packb(["activation", [0, 0], {1: 2}, []]), 0),
    "an extension type": (msgpack.packb(["activation", [0, 0], {"a": msgpack.ExtType(5, b"x")}, []]), 0),
    "a time stamp": (msgpack.packb(["activation", [0, 0], {"a": msgpack.Timestamp(1)}, []]), 0),
    "text that is not UTF-8": (b"\x94\xa2\xff\xfe\x90\x80\x90", 0),
    "tensors that are a number": (header(3), 0),
    "a tensor that is a text": (header(["float32"]), 0),
    "a tensor without shape": (header([["", "float32"]]), 0),
    "an unknown dtype": (header([["", "float8", [2]]]), 8),
    "a dtype of many": (header([["", "complex64", [1]]]), 8),
    "an attribute of torch": (header([["", "Tensor", [2]]]), 8),
    "a negative extent": (header([["", "float32", [-2]]]), 8),
    "two negative extents": (header([["", "float32", [-1, -2]]]), 8),
    "an extent that is true": (header([["", "float32", [True, 2]]]), 8),
    "an extent that is a float": (header([["", "float32", [2.0]]]), 8),
    "an immense extent": (header([["", "float32", [2**40]]]), 8),
    "a product that is immense": (header([["", "float32", [2**39, 2**39]]]), 8),
    "many dimensions": (header([["", "float32", [1] * 17]]), 4),
    "strides for another number of dimensions": (header([["", "float32", [2], [1, 1]]]), 8),
    "strides that are no list": (header([["", "float32", [2], 1]]), 8),
    "strides twice": (header([["", "float32", [2], [1], [1]]]), 8),
    "a negative stride": (header([["", "float32", [2], [-1]]]), 8),
    "a stride that is true": (header([["", "float32", [2], [True]]]), 8),
    "strides that leave gaps": (header([["", "float32", [2], [2]]]), 8),
    "strides that leave gaps, with the bytes for it": (header([["", "float32", [2], [2]]]), 12),
    "strides that overlap": (header([["", "float32", [2, 2], [1, 1]]]), 12),
    "one number, repeated without end": (header([["", "float32", [2**39, 2**39], [0, 0]]]), 4),
    "nothing, repeated without end": (header([["", "float32", [0, 2**39, 2**39]]]), 0),
    "a name twice": (header([*FLOATS, *FLOATS]), 16),
    "a body too short": (header(FLOATS), 7),
    "no body": (header(FLOATS), 0),
    "a body too long": (header(FLOATS), 9),
    "a body where none belongs": (header([]), 1),
    "very many tensors": (header([[str(n), "uint8", [0]] for n in range(MOST_TENSORS + 1)]), 0),
    "nested very deep": (b"\x91" * 100_000 + b"\x90", 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_message_of_ours(name: str) -> None:
    packed, size = HOSTILE[name]
    with pytest.raises(BadMessage):
        decode(packed, memoryview(bytearray(size)))


@given(st.binary(max_size=200), st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_any_bytes_at_all(packed: bytes, size: int) -> None:
    """Never anything but ``BadMessage``, or a message that uses up the body."""
    body = memoryview(bytearray(size))
    try:
        found = decode(packed, body)
    except BadMessage:
        return
    assert sum(map(stored_bytes, found.tensors.values())) == size


PLAIN = st.none() | st.booleans() | st.integers(-1, 2**40) | st.text(max_size=8) | st.binary(max_size=8) | st.floats()
NEARLY = st.recursive(PLAIN | st.sampled_from(sorted(DTYPES)), lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@given(st.tuples(NEARLY, NEARLY, st.dictionaries(st.text(max_size=4), NEARLY, max_size=3), NEARLY))
@settings(max_examples=300, deadline=None)
def test_any_header_that_is_nearly_one(parts: tuple[Any, ...]) -> None:
    """No memory is made for what a header claims: the body is what there is."""
    try:
        found = decode(msgpack.packb(list(parts)), memoryview(bytearray(16)))
    except BadMessage:
        return
    assert sum(map(stored_bytes, found.tensors.values())) == 16


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -1.0], True),
        ([1.0, float("nan")], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
        ([3e38, 3e38], True),  # the sum is infinite, the numbers are not
        ([], True),
    ],
)
def test_finite(values: list[float], expected: bool) -> None:
    assert finite(torch.tensor(values)) is expected
    assert finite(torch.tensor([1, 2])) is True
