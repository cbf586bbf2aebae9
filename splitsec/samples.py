"""A party's samples: fields and ids, the order all parties agree on, batches and micro-batches.

Here: checks on what the party's own data function returned, agreement on ids without showing data, and the arithmetic
of batches, which every party does alike.  Not here: which party needs which field (``plan``), turns (``schedule``).

Ids are compared as keyed fingerprints (HMAC-SHA-256 under a key that the leader draws for the run), end to end
encrypted between the parties that hold samples.  A party that only computes never sees an id or a fingerprint.  This
is agreement, not private set intersection: a holder can test guesses of the other holder's ids
(docs/threat-model.md).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final

import torch

from splitsec.errors import SamplesError
from splitsec.partyfile import PartyFile
from splitsec.plan import Plan
from splitsec.usercode import user_code

__all__ = [
    "FINGERPRINT",
    "Mismatch",
    "Samples",
    "epoch_order",
    "fingerprints",
    "match",
    "micro_batch_rows",
    "read_own",
    "read_samples",
    "sample_keys",
    "seed_of",
]

FINGERPRINT: Final = 16
"""Bytes of one id's fingerprint: two different ids among 2**32 collide with probability about 2**-65."""


@dataclass(frozen=True)
class Samples:
    """``fields``: name to tensor ``[n, ...]``; ``ids``: n different strings, or None where the party gave none."""

    fields: Mapping[str, torch.Tensor]
    ids: tuple[str, ...] | None
    count: int

    def take(self, rows: torch.Tensor) -> Samples:
        """The samples at ``rows`` (int64 ``[k]``), in that order."""
        ids = None if self.ids is None else tuple(self.ids[int(row)] for row in rows)
        return Samples({name: tensor[rows] for name, tensor in self.fields.items()}, ids, len(rows))


def read_samples(returned: Any, *, source: str, needed: frozenset[str]) -> Samples:
    """Check what a data function returned and keep the fields that this party's plan needs.

    ``source`` names the function for errors.  Raises ``SamplesError``.
    """
    if not isinstance(returned, Mapping):
        raise SamplesError(
            f"{source} returned {type(returned).__name__}",
            expected="a dict of field name to tensor, first dimension samples, and optionally 'id'",
        )
    missing = sorted(needed - set(returned))
    if missing:
        raise SamplesError(
            f"{source} returned no field {missing[0]!r}; it has {', '.join(map(repr, returned)) or 'none'}",
            expected=f"the fields {', '.join(map(repr, sorted(needed)))}, which the graph file reads at this party",
            fix="return that field, or name another in the graph file (`data:` of the segment, `field:` of the labels)",
        )
    fields = {}
    for name in sorted(needed):
        try:
            tensor = torch.as_tensor(returned[name])
        except (TypeError, ValueError, RuntimeError) as error:
            raise SamplesError(
                f"{source}: field {name!r} is no tensor or array", expected="a tensor or array"
            ) from error
        if tensor.dim() == 0:
            raise SamplesError(f"{source}: field {name!r} is a single number", expected="one entry for each sample")
        fields[name] = tensor
    lengths = {name: len(tensor) for name, tensor in fields.items()}
    ids = _ids(returned["id"], source) if "id" in returned else None
    if ids is not None:
        lengths["id"] = len(ids)
    if len(set(lengths.values())) > 1:
        raise SamplesError(
            f"{source}: fields of unequal length: " + ", ".join(f"{name} {n}" for name, n in lengths.items()),
            expected="one entry for each sample in every field",
        )
    return Samples(fields, ids, next(iter(lengths.values()), 0))


def read_own(party_file: PartyFile, plan: Plan, splits: Sequence[str], *, labels: bool) -> dict[str, Samples]:
    """This party's samples for each of ``splits`` that its party file names a function for."""
    needed = frozenset[str]().union(*(stream.fields(labels=labels) for stream in plan.streams))
    data = party_file.data
    if not needed or data is None:
        return {}
    own = {}
    for split in splits:
        spec = getattr(data, split)
        if spec is not None:
            function = party_file.function(spec, "data", split)
            with user_code(f"data function `{spec}`", (party_file.file, party_file.line_of("data", split))):
                returned = function(**data.args)
            own[split] = read_samples(returned, source=f"{party_file.file}: `{spec}`", needed=needed)
    return own


def _ids(given: Any, source: str) -> tuple[str, ...]:
    try:
        values = given.tolist() if hasattr(given, "tolist") else list(given)
    except TypeError:
        values = None
    if not isinstance(values, list):
        raise SamplesError(
            f"{source}: 'id' is {type(given).__name__}",
            expected="a list of texts or whole numbers, one for each sample",
        )
    ids = []
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | Integral) or value == "":
            raise SamplesError(
                f"{source}: the id in row {row} is missing or not usable ({type(value).__name__})",
                expected="a text or a whole number for every sample",
            )
        ids.append(str(value))
    seen: dict[str, int] = {}
    for row, sample_id in enumerate(ids):
        if sample_id in seen:
            raise SamplesError(
                f"{source}: rows {seen[sample_id]} and {row} have the same id",
                expected="every sample id once",
                fix="remove or rename one of the two rows",
            )
        seen[sample_id] = row
    return tuple(ids)


def sample_keys(samples: Samples, inputs: Collection[str] = ()) -> list[bytes]:
    """What tells each sample apart from run to run, for the ledger: its id or, where it has none, its fields.

    ``inputs``: the fields that make a sample what it is; without any, all of them.  Equal rows have one key, and so
    share one count: too much and never too little, since a person may stand there twice.  SHA-256; the ledger stores
    them under a key of its own only.
    """
    if samples.ids is not None:
        return [hashlib.sha256(b"id/" + one.encode("utf-8", "surrogatepass")).digest() for one in samples.ids]
    if not samples.count:
        return []
    fields = {name: tensor for name, tensor in samples.fields.items() if not inputs or name in inputs}
    parts = [f"{name}/{tensor.dtype}/{tuple(tensor.shape[1:])}/".encode() for name, tensor in fields.items()]
    tensors = [tensor.contiguous().view(torch.uint8).reshape(samples.count, -1) for tensor in fields.values()]
    keys = []
    for row in range(samples.count):
        digest = hashlib.sha256(b"fields/")
        for part, tensor in zip(parts, tensors, strict=True):
            digest.update(part)
            digest.update(tensor[row].numpy().data)
        keys.append(digest.digest())
    return keys


def fingerprints(ids: Sequence[str], key: bytes) -> list[bytes]:
    """HMAC-SHA-256 of every id under ``key``, cut to ``FINGERPRINT`` bytes (RFC 2104, section 5: truncation)."""
    return [hmac.digest(key, sample_id.encode(), hashlib.sha256)[:FINGERPRINT] for sample_id in ids]


@dataclass(frozen=True)
class Mismatch:
    """Ids do not fit: rows (own) that the leader does not have, and positions (leader's) that we do not have."""

    extra: tuple[int, ...]
    missing: tuple[int, ...]


def match(ids: Sequence[str], key: bytes, leader: Sequence[bytes], *, extra_allowed: bool) -> list[int] | Mismatch:
    """Our row for each of the leader's samples, in the leader's order; or what does not fit."""
    own = {print_: row for row, print_ in enumerate(fingerprints(ids, key))}
    missing = tuple(position for position, print_ in enumerate(leader) if print_ not in own)
    wanted = set(leader)
    extra = () if extra_allowed else tuple(row for print_, row in own.items() if print_ not in wanted)
    if missing or extra:
        return Mismatch(extra, missing)
    return [own[print_] for print_ in leader]


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from the names of what it is for: SHA-256 of ``splitsec/part/part/...``, first 8 bytes, halved."""
    text = "/".join(["splitsec", *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def epoch_order(seed: int, epoch: int, stream: int, count: int) -> torch.Tensor:
    """The order of training samples in one epoch, int64 ``[count]``, over the leader's order; every party computes
    the same.
    """
    generator = torch.Generator().manual_seed(seed_of("order", seed, epoch, stream))
    return torch.randperm(count, generator=generator)


def micro_batch_rows(rows: int, micro_batches: int) -> list[int]:
    """Sizes of the micro-batches of a batch, as ``torch.tensor_split`` cuts it; empty ones are left out."""
    small, larger = divmod(rows, micro_batches)
    return [size for i in range(micro_batches) if (size := small + (i < larger))]
