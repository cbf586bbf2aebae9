"""A party's samples: what a data function may return, ids that agree without being shown, and the order of an epoch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitsec.errors import PartyFileError, SamplesError
from splitsec.graph import parse_graph
from splitsec.partyfile import load_party
from splitsec.plan import make_plan
from splitsec.samples import (
    FINGERPRINT,
    Mismatch,
    epoch_order,
    fingerprints,
    match,
    read_own,
    read_samples,
    seed_of,
)

X = torch.arange(6.0).reshape(3, 2)


def read(returned: Any, *needed: str) -> Any:
    return read_samples(returned, source="data:train", needed=frozenset(needed or ("x",)))


# --- what a data function returns


def test_the_fields_that_are_needed_are_kept_as_tensors_and_the_others_left() -> None:
    samples = read({"x": X, "y": numpy.array([1, 0, 2]), "secret": X, "id": ["a", "b", "c"]}, "x", "y")
    assert set(samples.fields) == {"x", "y"}
    assert samples.fields["x"] is X
    assert samples.fields["y"].dtype == torch.int64
    assert samples.fields["y"].tolist() == [1, 0, 2]
    assert (samples.ids, samples.count) == (("a", "b", "c"), 3)


def test_ids_may_be_whole_numbers_and_may_be_missing() -> None:
    assert read({"x": X, "id": torch.tensor([7, 5, 6])}).ids == ("7", "5", "6")
    assert read({"x": X, "id": numpy.array(["p", "q", "r"])}).ids == ("p", "q", "r")
    assert read({"x": X, "id": list(numpy.arange(3))}).ids == ("0", "1", "2")
    assert read({"x": X}).ids is None


def test_no_samples_are_samples_too() -> None:
    samples = read({"x": torch.empty(0, 2), "id": []})
    assert (samples.ids, samples.count) == ((), 0)


def test_samples_are_taken_in_the_order_asked_for() -> None:
    taken = read({"x": X, "id": ["a", "b", "c"]}).take(torch.tensor([2, 0]))
    assert taken.fields["x"].tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert (taken.ids, taken.count) == (("c", "a"), 2)
    assert read({"x": X}).take(torch.tensor([1])).ids is None


@pytest.mark.parametrize(
    ("returned", "seen", "expected"),
    [
        ([X], "data:train returned list", "a dict of field name to tensor"),
        (None, "data:train returned NoneType", "a dict of field name to tensor"),
        ({"y": X}, "data:train returned no field 'x'; it has 'y'", "the fields 'x', which the graph file reads"),
        ({}, "data:train returned no field 'x'; it has none", "the fields 'x'"),
        ({"x": [[1.0], [2.0, 3.0]]}, "field 'x' is no tensor or array", "a tensor or array"),
        ({"x": numpy.array(["text"])}, "field 'x' is no tensor or array", "a tensor or array"),
        ({"x": torch.tensor(3.0)}, "field 'x' is a single number", "one entry for each sample"),
        ({"x": X, "id": ["a", "b"]}, "fields of unequal length: x 3, id 2", "one entry for each sample in every field"),
        ({"x": X, "id": ["a", "b", "a"]}, "rows 0 and 2 have the same id", "every sample id once"),
        ({"x": X, "id": ["1", 2, 1]}, "rows 0 and 2 have the same id", "every sample id once"),
        ({"x": X, "id": ["a", "", "c"]}, "the id in row 1 is missing or not usable (str)", "a text or a whole number"),
        ({"x": X, "id": ["a", "b", None]}, "the id in row 2 is missing or not usable (NoneType)", "a whole number"),
        ({"x": X, "id": [0.5, 1.5, 2.5]}, "the id in row 0 is missing or not usable (float)", "a whole number"),
        ({"x": X, "id": [True, False, 2]}, "the id in row 0 is missing or not usable (bool)", "a whole number"),
        ({"x": X, "id": None}, "'id' is NoneType", "a list of texts or whole numbers"),
        ({"x": X, "id": torch.tensor(3)}, "'id' is Tensor", "a list of texts or whole numbers"),
        ({"x": X, "id": torch.zeros(3, 2)}, "the id in row 0 is missing or not usable (list)", "a whole number"),
    ],
)
def test_what_cannot_be_samples_is_refused_with_the_reason(returned: Any, seen: str, expected: str) -> None:
    with pytest.raises(SamplesError) as caught:
        read(returned)
    assert seen in caught.value.seen
    assert expected in caught.value.expected


def test_the_error_names_every_field_of_another_length() -> None:
    with pytest.raises(SamplesError) as caught:
        read({"x": X, "y": torch.zeros(4)}, "x", "y")
    assert "fields of unequal length: x 3, y 4" in caught.value.seen


# --- this party's own


GRAPH = """\
splitsec: 1
name: small
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:7400"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
cuts:
  - {from: stem, to: trunk, shape: [2], dtype: float32}
labels:
  - {from: clinic, to: trunk}
"""
PARTY = """\
party: clinic
segments:
  stem: {model: "models:stem", optimizer: {name: sgd, lr: 0.1}}
data: {train: "data:train", test: "data:test", args: {site: 4}}
"""
DATA = """\
import torch

def train(site):
    return {"x": torch.full((site, 2), 1.0), "y": torch.zeros(site, dtype=torch.int64), "name": ["not needed"]}

def test(site):
    raise FileNotFoundError("scans-2024.csv")
"""


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    (tmp_path / "data.py").write_text(DATA)
    (tmp_path / "clinic.yaml").write_text(PARTY)
    return tmp_path / "clinic.yaml"


def test_a_party_reads_the_fields_of_its_plan_with_its_own_arguments(clinic: Path) -> None:
    plan = make_plan(parse_graph(GRAPH), "clinic")
    own = read_own(load_party(clinic), plan, ("train", "predict"), labels=True)
    assert set(own) == {"train"}, "it names no function for samples to predict"
    assert (set(own["train"].fields), own["train"].count) == ({"x", "y"}, 4)
    without = read_own(load_party(clinic), plan, ("train",), labels=False)
    assert set(without["train"].fields) == {"x"}


def test_a_party_that_the_graph_asks_for_nothing_reads_nothing(clinic: Path) -> None:
    """Its data functions, one of which would fail, are not even called."""
    plan = make_plan(parse_graph(GRAPH), "server")
    assert read_own(load_party(clinic), plan, ("train", "test"), labels=True) == {}


def test_a_data_function_that_fails_is_the_partys_own_error(clinic: Path) -> None:
    with pytest.raises(PartyFileError, match=r"data\.py:7: data function `data:test` failed: FileNotFoundError: scans"):
        read_own(load_party(clinic), make_plan(parse_graph(GRAPH), "clinic"), ("test",), labels=True)


def test_what_it_returns_wrongly_is_named_with_the_party_file(clinic: Path) -> None:
    (clinic.parent / "data.py").write_text("def train(site):\n    return {'x': [1.0]}\n")
    with pytest.raises(SamplesError, match=r"clinic\.yaml: `data:train` returned no field 'y'"):
        read_own(load_party(clinic), make_plan(parse_graph(GRAPH), "clinic"), ("train",), labels=True)


# --- ids that agree


IDS = st.lists(st.text(min_size=1, max_size=8), max_size=20, unique=True)


def test_a_fingerprint_is_a_truncated_hmac() -> None:
    """RFC 4231, test case 2."""
    assert fingerprints(["what do ya want for nothing?"], b"Jefe") == [
        bytes.fromhex("5bdcc146bf60754e6a042426089575c7")
    ]
    assert FINGERPRINT == 16


@settings(max_examples=60, deadline=None)
@given(
    both=IDS.flatmap(lambda ids: st.tuples(st.just(ids), st.permutations(ids))), key=st.binary(min_size=32, max_size=32)
)
def test_rows_are_found_in_the_leaders_order(both: tuple[list[str], list[str]], key: bytes) -> None:
    ids, leader = both
    rows = match(ids, key, fingerprints(leader, key), extra_allowed=False)
    assert isinstance(rows, list)
    assert [ids[row] for row in rows] == leader


@pytest.mark.threat("T37")
@settings(max_examples=60, deadline=None)
@given(ids=IDS, here=st.sets(st.integers(0, 19)), there=st.sets(st.integers(0, 19)))
def test_what_one_of_them_lacks_is_found_on_both_sides(ids: list[str], here: set[int], there: set[int]) -> None:
    own = [name for place, name in enumerate(ids) if place in here]
    leader = [name for place, name in enumerate(ids) if place in there]
    found = match(own, b"k" * 32, fingerprints(leader, b"k" * 32), extra_allowed=False)
    if set(own) == set(leader):
        assert isinstance(found, list)
    else:
        assert isinstance(found, Mismatch)
        assert {own[row] for row in found.extra} == set(own) - set(leader)
        assert {leader[position] for position in found.missing} == set(leader) - set(own)


def test_who_serves_several_members_may_hold_more_than_one_of_them_has() -> None:
    leader = fingerprints(["c", "a"], b"k")
    assert match(["a", "b", "c"], b"k", leader, extra_allowed=True) == [2, 0]
    assert match(["a", "b", "c"], b"k", leader, extra_allowed=False) == Mismatch(extra=(1,), missing=())
    assert match(["a", "b"], b"k", leader, extra_allowed=True) == Mismatch(extra=(), missing=(0,))


def test_fingerprints_under_another_key_say_nothing() -> None:
    ids = ["a", "b"]
    assert match(ids, b"one", fingerprints(ids, b"two"), extra_allowed=False) == Mismatch((0, 1), (0, 1))


# --- seeds and orders: docs/protocol.md


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.text("abc-0123456789", max_size=6), st.integers(0, 2**63 - 1)), max_size=4))
def test_a_seed_is_the_first_eight_bytes_of_a_hash_halved(parts: list[str | int]) -> None:
    digest = hashlib.sha256("/".join(["splitsec", *map(str, parts)]).encode()).digest()
    assert seed_of(*parts) == int.from_bytes(digest[:8], "big") // 2 < 2**63


def test_seeds_as_other_implementations_must_get_them() -> None:
    assert seed_of("weights", 7, "stem") == 417398131351050675
    assert seed_of("order", 7, 0, 0) == 5447141490945721059
    assert epoch_order(7, 0, 0, 8).tolist() == [2, 4, 0, 5, 6, 3, 7, 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 99), stream=st.integers(0, 9), count=st.integers(0, 200))
def test_the_order_of_an_epoch_has_every_row_once(seed: int, epoch: int, stream: int, count: int) -> None:
    order = epoch_order(seed, epoch, stream, count)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(count))


def test_every_epoch_stream_and_seed_has_an_order_of_its_own_whatever_else_was_drawn() -> None:
    orders = [(7, 0, 0), (7, 1, 0), (7, 0, 1), (8, 0, 0)]
    first = [tuple(epoch_order(*which, 50).tolist()) for which in orders]
    assert len(set(first)) == 4
    torch.rand(5)
    assert [tuple(epoch_order(*which, 50).tolist()) for which in orders] == first
