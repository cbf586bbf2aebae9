"""Whose turn it is in an anonymous group: each order as likely as another, the same at all members, known to no-one."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections import Counter
from collections.abc import Sequence

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from splitsec.turns import Secret, order, rows, run_of

KEY, RUN = b"k" * 32, b"r" * 32
EPOCHS = 6000
ORDER = (7, 1, 5, 8, 4, 6, 0, 2, 3)
UNLIKELY = 1e-6
"""Chance that a fair draw fails one of the tests here; they are seeded, so they fail always or never."""


def chance(found: Sequence[int], degrees: int) -> float:
    """The chance that fair draws differ as much as ``found`` from even counts or more: the upper tail of chi-square.

    By Wilson and Hilferty's normal approximation, good to a few percent where it matters here.
    """
    expected = sum(found) / len(found)
    value = sum((one - expected) ** 2 / expected for one in found)
    deviation = ((value / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(deviation / math.sqrt(2))


def test_chance_knows_what_is_fair_and_what_is_not() -> None:
    assert 0.01 < chance([1010, 990, 1005, 995], 3) <= 1
    assert chance([1200, 940, 930, 930], 3) < UNLIKELY
    assert chance([1058, 942], 1) == pytest.approx(0.0095, rel=0.1)  # from a table: 6.73 with one degree of freedom


@pytest.mark.threat("T80")
def test_every_order_of_four_members_is_as_likely() -> None:
    found = Counter(order(KEY, RUN, epoch, 4) for epoch in range(EPOCHS))
    assert set(found) == set(itertools.permutations(range(4)))
    assert chance(list(found.values()), 23) > UNLIKELY


@pytest.mark.threat("T80")
def test_from_one_epoch_nothing_follows_for_the_next() -> None:
    pairs = Counter(
        (order(KEY, RUN, epoch, 3)[0], order(KEY, RUN, epoch + 1, 3)[0], order(KEY, RUN, epoch + 1, 3)[1])
        for epoch in range(EPOCHS)
    )
    assert len(pairs) == 3 * 6
    assert chance(list(pairs.values()), 17) > UNLIKELY


def test_every_row_comes_everywhere_alike() -> None:
    """A member with more rows than the others uses the first of them: which, changes with each epoch."""
    first = Counter(row for epoch in range(EPOCHS // 10) for row in rows(KEY, RUN, "train", epoch, 0, 40)[:10])
    assert len(first) == 40
    assert chance(list(first.values()), 39) > UNLIKELY


@pytest.mark.parametrize("members", [1, 2, 5, 1000])
def test_all_members_have_one_turn_each(members: int) -> None:
    assert sorted(order(KEY, RUN, 0, members)) == list(range(members))


@pytest.mark.threat("T80", "T89")
def test_each_thing_it_is_drawn_for_gives_another_order() -> None:
    drawn = [
        order(KEY, RUN, 0, 50),
        order(b"l" * 32, RUN, 0, 50),
        order(KEY, b"s" * 32, 0, 50),
        order(KEY, RUN, 1, 50),
        *(
            tuple(rows(KEY, RUN, split, epoch, stream, 50))
            for split in ("train", "test")
            for epoch in (0, 1)
            for stream in (0, 1)
        ),
        tuple(rows(b"l" * 32, RUN, "train", 0, 0, 50)),
    ]
    assert len(set(drawn)) == len(drawn)


def test_as_it_is_written() -> None:
    """The words of the module's first lines, done again by hand; and as it was when it was first written."""

    def by_hand(count: int, purpose: bytes) -> list[int]:
        key = HKDF(SHA256(), 32, salt=RUN, info=purpose).derive(KEY)
        blocks = [HKDFExpand(SHA256(), 8160, info=struct.pack(">I", block)).derive(key) for block in range(2)]
        words = iter(struct.unpack(">4080I", b"".join(blocks)))
        places = list(range(count))
        for left in range(count, 1, -1):
            word = next(word for word in words if word < 2**32 // left * left)
            places[left - 1], places[word % left] = places[word % left], places[left - 1]
        return places

    assert list(order(KEY, RUN, 7, 9)) == by_hand(9, b"splitsec/turns/" + bytes(7) + b"\x07")
    place = bytes(7) + b"\x02" + bytes(7) + b"\x01"
    assert rows(KEY, RUN, "test", 2, 1, 3000) == by_hand(3000, b"splitsec/rows/" + place + b"test")
    assert (
        run_of(b"d" * 32, [b"a" * 32, b"b" * 32])
        == hashlib.sha256(b"splitsec/run/" + b"d" * 32 + b"a" * 32 + b"b" * 32).digest()
    )
    assert order(KEY, RUN, 0, 9) == ORDER


def test_words_that_would_make_some_places_likelier_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With words below 8 in place of 2^32, one of three places would else come up three times in eight."""
    import splitsec.turns

    real = splitsec.turns._words
    monkeypatch.setattr(splitsec.turns, "_words", lambda key: (word % 8 for word in real(key)))
    monkeypatch.setattr(splitsec.turns, "_WORDS", 8)
    found = Counter(order(KEY, RUN, epoch, 3) for epoch in range(EPOCHS))
    assert chance(list(found.values()), 5) > UNLIKELY


def test_a_secret_says_the_same_and_does_not_show_its_key() -> None:
    secret = Secret(KEY, RUN, 5)
    assert secret.order(3) == order(KEY, RUN, 3, 5)
    assert secret.rows("train", 3, 2, 20) == rows(KEY, RUN, "train", 3, 2, 20)
    assert str(KEY) not in repr(secret) and KEY.hex() not in repr(secret)
