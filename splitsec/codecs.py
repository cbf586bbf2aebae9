"""Tensors of a cut made smaller for the way, where the graph names a codec for it, and made whole again behind it.

Here: what each codec makes of a tensor (docs/protocol.md, "Codecs") and back, with every check that hostile bytes need;
what two ends must remember between an activation and its gradient; the test that a segment ends in a ReLU.  Not here:
which cuts may have a codec (``graph``), when it acts (``guard``, between the safeguards and the channel), how its
tensors become bytes (``messages``).

``bfloat16``, ``float16`` and ``int8`` round: a training with them is another training.  ``nonzero`` is exact.  Behind a
ReLU many numbers are +0.0, and a ReLU lets no gradient pass where its output is 0: so the places of zeros are left out
both ways, and weights are the same to the last bit.  How long its messages are follows from how many zeros there are,
in steps (``padded``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from splitsec.errors import UnsafeSegment
from splitsec.graph import EXACT
from splitsec.messages import DTYPES, NAMES, Message, finite, row_major, stored
from splitsec.plan import Edge, Lane

__all__ = [
    "BadWire",
    "Codecs",
    "Coded",
    "Places",
    "Unfit",
    "check_source",
    "from_bfloat16",
    "from_float16",
    "from_int8",
    "padded",
    "places_of",
    "to_bfloat16",
    "to_float16",
    "to_int8",
]


class BadWire(ValueError):
    """What arrived is not what the lane's codec makes.  ``guard`` turns it into an error that names the peer."""


class Unfit(ValueError):
    """A tensor that the lane's codec cannot carry.  ``guard`` turns it into a refusal to send."""


class Coded(NamedTuple):
    """A tensor as its codec has it travel: tensors and facts of a message."""

    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = {}


# --- codecs that round


def to_bfloat16(tensor: torch.Tensor) -> Coded:
    """Each number of ``tensor`` (float32 or float64) as the nearest bfloat16, ties to even.

    |error| <= 1.001 · 2^-8 |x| + 2^-134.  Raises ``Unfit`` where a number is too large: from about 3.39e38.
    """
    small, shape = _once(tensor)
    coded = small.to(torch.bfloat16)
    if not finite(coded):
        raise Unfit("numbers that are too large for bfloat16, whose largest is 3.39e38")
    return Coded({"": coded.expand(shape)})


def from_bfloat16(coded: Coded, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What ``to_bfloat16`` left of a tensor of ``shape`` and ``dtype``.  Raises ``BadWire``."""
    if coded.facts:
        raise BadWire("facts beside the tensor")
    small, shape = _once(_main(coded, shape, torch.bfloat16))
    return small.to(dtype).expand(shape)


def to_float16(tensor: torch.Tensor) -> Coded:
    """Each number of ``tensor`` (float32 or float64), divided by a power of two, as the nearest float16, ties to even.

    The power of two is of the whole message: it brings the largest number between 2^14 and 2^15, so that none is too
    large, and small ones lose as little as may be.  Fact ``exponent``: its exponent.  With m the largest |x|, |error|
    <= 1.001 · 2^-11 |x| + 2^-39 m + 2^-149.
    """
    small, shape = _once(tensor)
    most = _largest(small).item()
    exponent = max(math.frexp(most)[1] - 15, _exponents(tensor.dtype).start) if most else 0
    coded = (small * 2.0**-exponent if exponent else small).to(torch.float16)
    return Coded({"": coded.expand(shape)}, {"exponent": exponent})


def from_float16(coded: Coded, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What ``to_float16`` left of a tensor of ``shape`` and ``dtype``.  Raises ``BadWire``."""
    exponent = coded.facts.get("exponent")
    if len(coded.facts) != 1 or type(exponent) is not int or exponent not in _exponents(dtype):
        raise BadWire("no exponent that its numbers can have")
    small, shape = _once(_main(coded, shape, torch.float16))
    whole = small.to(dtype)
    return (whole.mul_(2.0**exponent) if exponent else whole).expand(shape)


def _exponents(dtype: torch.dtype) -> range:
    """The exponents of the scales of tensors of ``dtype``: the scale and one over it are normal numbers of it."""
    lowest, highest = (-126, 128) if dtype is torch.float32 else (-1022, 1024)
    return range(lowest, highest - 14)


SMALLEST_SCALE: Final = 2.0**-126
LARGEST_SCALE: Final = 2.0**120


def to_int8(tensor: torch.Tensor) -> Coded:
    """Each number of ``tensor`` (float32 or float64), divided by a scale, as the nearest whole number.

    Scales are float32: the largest |x| over 127, of each channel (dimension 1) over the whole message, or of each row
    where a sample has one dimension.  |error| <= 0.5001 scale.  Raises ``Unfit`` where a number is above 127 · 2^120.
    """
    axis, count = _scales_of(tensor.shape)
    small, shape = _once(tensor, keep=axis)
    over = [dimension for dimension in range(small.dim()) if dimension != axis]
    most = torch.maximum(small.amax(over), small.amin(over).neg_())
    scales = (most.to(torch.float64) / 127).to(torch.float32).clamp_(min=SMALLEST_SCALE)
    if not scales.amax().item() <= LARGEST_SCALE:
        raise Unfit("numbers that are too large for int8, which takes them up to 1.68e38")
    coded = (small / _along(scales, axis, small)).round_().to(torch.int8)
    return Coded({"": coded.expand(shape), "scales": scales.expand(count).contiguous()})


def from_int8(coded: Coded, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What ``to_int8`` left of a tensor of ``shape`` and ``dtype``.  Raises ``BadWire``."""
    if coded.facts:
        raise BadWire("facts beside the tensor")
    main = _main(coded, shape, torch.int8, "scales")
    axis, count = _scales_of(main.shape)
    scales = _line(coded.tensors["scales"], torch.float32, count, "scales")
    if not (scales.amin().item() >= SMALLEST_SCALE and scales.amax().item() <= LARGEST_SCALE):
        raise BadWire("scales that are zero, negative, too large or no numbers")
    small, shape = _once(main, keep=axis)
    return small.to(dtype).mul_(_along(scales, axis, small)).expand(shape)


def _scales_of(shape: Sequence[int]) -> tuple[int, int]:
    """The dimension along which scales lie, and how many there are."""
    axis = 1 if len(shape) > 2 else 0
    return axis, shape[axis]


def _along(scales: torch.Tensor, axis: int, tensor: torch.Tensor) -> torch.Tensor:
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return scales.to(tensor.dtype if tensor.is_floating_point() else torch.float32).view(shape)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(tensor)
    return torch.maximum(high, -low)


def _once(tensor: torch.Tensor, *, keep: int = -1) -> tuple[torch.Tensor, tuple[int, ...]]:
    """``tensor`` with numbers that memory only repeats (stride 0) there once, and the shape that it has with them.

    The dimension ``keep`` stays whole.  What is left lies in memory without gaps.
    """
    laid = _laid(tensor)
    for dimension, (extent, stride) in enumerate(zip(laid.shape, laid.stride(), strict=True)):
        if stride == 0 and extent > 1 and dimension != keep:
            laid = laid.narrow(dimension, 0, 1)
    return laid, tuple(tensor.shape)


def _laid(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy row by row where it has gaps in memory: as ``messages.encode`` does it."""
    tensor = tensor.detach().cpu()
    return tensor if stored(tensor.shape, tensor.stride()) is not None else tensor.contiguous()


# --- the codec that leaves zeros out


BUCKETS: Final = 128
"""Into about so many lengths falls what a message of one shape can have."""
LEAST_STEP: Final = 16
"""Numbers; a smaller tensor has fewer lengths."""


def padded(count: int, of: int) -> int:
    """To how many numbers ``count`` of a tensor of ``of`` numbers are filled up, with zeros."""
    step = -(-of // (BUCKETS * LEAST_STEP)) * LEAST_STEP
    return min(of, max(1, -(-count // step)) * step)


@dataclass(frozen=True)
class Places:
    """Where a tensor is not +0.0: of the activation, and so of the gradient that comes back for it.

    ``bits``: one for each number in the order of memory, from the most significant of the first byte on.
    """

    bits: npt.NDArray[np.uint8]
    count: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    def indices(self, strides: Sequence[int]) -> npt.NDArray[np.int64]:
        """The places in order of the memory of a tensor of the same shape that is laid out by ``strides``."""
        mask = np.unpackbits(self.bits, count=self.size)
        if tuple(strides) != self.strides:
            laid = torch.empty(self.size, dtype=torch.uint8)
            there = torch.from_numpy(mask).as_strided(self.shape, self.strides)
            laid.as_strided(self.shape, tuple(strides)).copy_(there)
            mask = laid.numpy()
        return np.flatnonzero(mask.view(bool))


def places_of(tensor: torch.Tensor) -> Places:
    """Where ``tensor``, which memory holds without gaps, is not +0.0.  Numbers that memory repeats count row by row."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if stored(shape, strides) != tensor.numel():
        tensor, strides = tensor.contiguous(), tuple(row_major(shape))
    mask = _bits(_flat(tensor)) != 0
    return Places(np.packbits(mask), int(np.count_nonzero(mask)), shape, strides)


def to_nonzero(tensor: torch.Tensor, places: Places, *, mask: bool) -> Coded:
    """Those numbers of ``tensor`` that are at ``places``, filled up to ``padded``; with ``mask``, and where they were.

    As it is where that is no longer, or where memory repeats its numbers.
    """
    plain = Coded({"": tensor})
    laid = _laid(tensor)
    length = padded(places.count, places.size)
    coded_bytes = length * laid.dtype.itemsize + (places.bits.nbytes if mask else 0)
    if stored(laid.shape, laid.stride()) != laid.numel() or coded_bytes >= laid.nbytes:
        return plain
    flat = _flat(laid)
    values = np.zeros(length, dtype=flat.dtype)
    flat.take(places.indices(laid.stride()), out=values[: places.count], mode="clip")  # "raise" would copy once more
    facts: dict[str, Any] = {"rows": len(laid)} if mask else {}
    if (strides := list(laid.stride())) != row_major(laid.shape):
        facts["strides"] = strides
    tensors = {"values": torch.from_numpy(values)}
    return Coded({**tensors, "mask": torch.from_numpy(places.bits)} if mask else tensors, facts)


def from_nonzero(
    coded: Coded, shape: Sequence[int], rows: int, dtype: torch.dtype, places: Places | None
) -> tuple[torch.Tensor, Places]:
    """The tensor that ``to_nonzero`` made smaller, with zeros elsewhere; and its places.

    ``shape``: of one sample; ``rows``: most samples.  ``places``: of the activation, where a gradient comes back for
    it; without, there is a mask.  Raises ``BadWire``.
    """
    if "" in coded.tensors:
        if coded.facts:
            raise BadWire("facts beside the tensor")
        tensor = _main(coded, (rows, *shape), dtype)
        if places is not None and tensor.shape != places.shape:
            raise BadWire(f"shape {list(tensor.shape)}")
        return tensor, places or places_of(tensor)
    wanted = {"values"} if places is not None else {"values", "mask"}
    if set(coded.tensors) != wanted:
        raise BadWire(f"{len(coded.tensors)} tensors")
    facts = dict(coded.facts)
    if places is None:
        count = facts.pop("rows", None)
        if type(count) is not int or not 0 < count <= rows:
            raise BadWire("no number of samples that its cut has")
        whole: tuple[int, ...] = (count, *shape)
    else:
        whole = places.shape
    strides = tuple(row_major(whole))
    if "strides" in facts:
        strides = _strides(facts.pop("strides"), whole)
    if facts:
        raise BadWire("facts that mean nothing")
    size = math.prod(whole)
    given = places is not None
    if places is None:
        bits = _line(coded.tensors["mask"], torch.uint8, -(-size // 8), "mask").numpy().copy()
        if size % 8 and bits[-1] & (0xFF >> size % 8):
            raise BadWire("a mask with bits beyond its end")
        places = Places(bits, int(np.count_nonzero(np.unpackbits(bits, count=size))), whole, strides)
    values = _line(coded.tensors["values"], dtype, padded(places.count, size), "values")
    raw = _bits(values.numpy())
    if raw[places.count :].any():
        raise BadWire("other numbers than the mask has places for")
    if not given and not raw[: places.count].all():
        raise BadWire("zeros where its mask says that there are none")
    flat = torch.zeros(size, dtype=dtype)
    flat.scatter_(0, torch.from_numpy(places.indices(strides)), values[: places.count])
    return flat.as_strided(whole, strides), places


def _flat(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The numbers of ``tensor`` in the order of memory, which holds each once and nothing between."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).numpy()


def _bits(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``numbers`` as whole numbers of as many bits: 0 for +0.0 and for nothing else."""
    return numbers.view(np.int32 if numbers.itemsize == 4 else np.int64)


# --- what arrives


def _main(coded: Coded, shape: Sequence[int], dtype: torch.dtype, *others: str) -> torch.Tensor:
    """The tensor without a name, which has one number for each of ``shape``, whose first is the most it may be."""
    if set(coded.tensors) != {"", *others}:
        raise BadWire(f"{len(coded.tensors)} tensors")
    tensor = coded.tensors[""]
    if tensor.dtype != dtype:
        raise BadWire(f"dtype {NAMES[tensor.dtype]}")
    if tensor.dim() != len(shape) or not 0 < len(tensor) <= shape[0] or tuple(tensor.shape[1:]) != tuple(shape[1:]):
        raise BadWire(f"shape {list(tensor.shape)}")
    return tensor


def _line(tensor: torch.Tensor, dtype: torch.dtype, length: int, what: str) -> torch.Tensor:
    """``tensor``, if it is ``length`` numbers that lie one after another."""
    if tensor.dtype != dtype:
        raise BadWire(f"{what} of dtype {NAMES[tensor.dtype]}")
    if tensor.shape != (length,) or not tensor.is_contiguous():
        raise BadWire(f"{list(tensor.shape)} {what}, where {length} are due")
    return tensor


def _strides(given: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    size = math.prod(shape)
    match given:
        case [*strides] if (
            len(strides) == len(shape)
            and all(type(one) is int and 0 <= one < 2**40 for one in strides)
            and stored(shape, strides) == size
        ):
            return tuple(strides)
    raise BadWire("strides that leave gaps or overlap")


# --- at the door


ROUNDING: Final[
    Mapping[
        str,
        tuple[Callable[[torch.Tensor], Coded], Callable[[Coded, Sequence[int], torch.dtype], torch.Tensor]],
    ]
] = {
    "bfloat16": (to_bfloat16, from_bfloat16),
    "float16": (to_float16, from_float16),
    "int8": (to_int8, from_int8),
}


class Codecs:
    """The codecs of one party's lanes, and what is remembered of activations until their gradients have passed.

    For each activation of a cut with ``nonzero`` both ends keep one bit a number, until the answer with its key or a
    later one: so never more than there are messages under way, which the lane bounds.
    """

    def __init__(self) -> None:
        self._places: dict[tuple[str, int], dict[tuple[int, ...], Places]] = {}

    def encode(self, lane: Lane, message: Message) -> Message:
        """What travels in place of ``message``, which may leave on ``lane``.  Raises ``Unfit``."""
        if lane.codec is None:
            return message
        back = lane.kind == "gradient"
        places = self._answered(lane, message.key) if back and lane.codec == EXACT else None
        if not message.tensors:
            return message
        (tensor,) = message.tensors.values()
        if lane.codec != EXACT:
            coded = ROUNDING[lane.codec][0](tensor)
        elif places is None and back:
            raise Unfit("an answer to what did not arrive")
        else:
            if places is None:
                tensor = _laid(tensor)
                places = self._remember(lane, message.key, places_of(tensor))
            coded = to_nonzero(tensor, places, mask=not back)
        return Message(message.kind, message.key, coded.facts, coded.tensors)

    def decode(self, lane: Lane, message: Message) -> Message:
        """The message that the peer's codec made smaller.  Raises ``BadWire``, before memory is made for too much."""
        if lane.codec is None:
            return message
        back = lane.kind == "gradient"
        places = self._answered(lane, message.key) if back and lane.codec == EXACT else None
        if back and not message.tensors:
            if message.facts:
                raise BadWire("facts without a tensor")
            return message
        coded, dtype = Coded(message.tensors, message.facts), DTYPES[lane.dtype]
        shape = tuple(extent or 0 for extent in lane.shape)
        rows = lane.rows or 0
        if lane.codec != EXACT:
            tensor = ROUNDING[lane.codec][1](coded, (rows, *shape), dtype)
        elif places is None and back:
            raise BadWire("an answer to what we have not sent")
        else:
            tensor, found = from_nonzero(coded, shape, rows, dtype, places)
            if not back:
                self._remember(lane, message.key, found)
        return Message(message.kind, message.key, tensors={"": tensor})

    def _remember(self, lane: Lane, key: tuple[int, ...], places: Places) -> Places:
        self._places.setdefault((lane.peer, lane.number), {})[key] = places
        return places

    def _answered(self, lane: Lane, key: tuple[int, ...]) -> Places | None:
        """The places of the activation with ``key``; it and those before it are forgotten."""
        kept = self._places.get((lane.peer, lane.number - 1), {})  # a way back is numbered after its way there
        found = kept.get(key)
        for one in [one for one in kept if one <= key]:
            del kept[one]
        return found

    @property
    def remembered(self) -> int:
        """How many activations are waiting for their gradients."""
        return sum(map(len, self._places.values()))


# --- at the segment


RELU: Final = "ReluBackward0"
BEHIND: Final = frozenset(
    (
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
        "MaxPool2DWithIndicesBackward0",
        "MaxPool3DWithIndicesBackward0",
    )
)
"""What may stand behind the ReLU: the same numbers in another shape, as ``nn.Flatten`` has them, and the largest of
several.  Where that is 0 all of them are, and whichever gets the gradient, the ReLU stops it.  (A mean of tiny numbers
may be rounded to 0, so no other pooling.)
"""


def check_source(edge: Edge, tensor: torch.Tensor) -> None:
    """Raise ``UnsafeSegment`` where ``edge`` leaves zeros out, and ``tensor``, its segment's output, is no ReLU's.

    While training, what made ``tensor`` is looked at: a ReLU's node of autograd, at most ``BEHIND`` after it.  Without
    gradients (evaluation, or a segment that does not train) no number may be negative; then nothing comes back that
    could be lost.
    """
    if edge.codec != EXACT or edge.local:
        return
    if not tensor.requires_grad:
        if not tensor.numel() or not tensor.amin().item() < 0:  # NaN is for the guard
            return
        seen = "there are negative numbers in it"
    else:
        node = tensor.grad_fn
        while node is not None and node.name() in BEHIND:
            node = node.next_functions[0][0]
        if node is not None and node.name() == RELU:
            return
        seen = f"it was made by {'nothing' if node is None else node.name().removesuffix('0').removesuffix('Backward')}"
    raise UnsafeSegment(
        f"what segment {edge.source!r} returns for its cut to {edge.target!r} is not the output of a ReLU: {seen}",
        expected=f"a ReLU at its end, since the graph says `codec: {EXACT}`: elsewhere a zero may have a gradient, and "
        "that would be lost",
        fix="let the module end in nn.ReLU (nn.Flatten and nn.MaxPool2d may follow), or remove `codec` from that cut "
        "in the graph file",
    )
