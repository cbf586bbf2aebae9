"""Policies: what is refused, what they say; "at least as strict as" is a partial order, and epsilon follows it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from splitsec.privacy.accounting import epsilon
from splitsec.privacy.errors import BadParameter
from splitsec.privacy.policy import LabelPolicy, Policy
from splitsec.privacy.release import Gaussian, Laplace, RandomisedResponse

FEW = st.sampled_from([0.5, 1.0, 1.0 + 2**-52, 2.0, 7.0])  # few values, so that equal ones are often drawn


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    clip = draw(st.none() | FEW)
    noise = None if clip is None else draw(st.sampled_from([None, "gaussian", "laplace"]))
    return Policy(clip, noise, None if noise is None else draw(FEW))  # type: ignore[arg-type]


LABEL_POLICIES = st.builds(LabelPolicy, FEW, st.sampled_from([2, 10]))
EITHER = st.tuples(policies(), policies(), policies()) | st.tuples(LABEL_POLICIES, LABEL_POLICIES, LABEL_POLICIES)


def stricter(own: Any, floor: Any) -> bool:
    return own.at_least(floor) is None


# --- the order


@given(EITHER)
def test_every_policy_is_at_least_as_strict_as_itself(three: tuple[Any, Any, Any]) -> None:
    assert stricter(three[0], three[0])


@given(EITHER)
def test_two_that_are_at_least_as_strict_as_each_other_are_equal(three: tuple[Any, Any, Any]) -> None:
    a, b, _ = three
    assert (stricter(a, b) and stricter(b, a)) == (a == b)


@given(EITHER)
@example((Policy(1, "laplace", 2), Policy(1, "laplace", 1), Policy(2)))
def test_stricter_than_stricter_is_stricter(three: tuple[Any, Any, Any]) -> None:
    a, b, c = three
    assert not (stricter(a, b) and stricter(b, c)) or stricter(a, c)


def price(policy: Policy | LabelPolicy, releases: int) -> float:
    mechanism = policy.mechanism((3, 4)) if isinstance(policy, Policy) else policy.mechanism()
    return math.inf if mechanism is None else epsilon({mechanism: releases}, 1e-5)


@settings(deadline=None)
@given(EITHER, st.integers(1, 20))
def test_a_stricter_policy_never_has_a_larger_epsilon(three: tuple[Any, Any, Any], releases: int) -> None:
    a, b, _ = three
    if stricter(a, b):
        assert price(a, releases) <= price(b, releases) * (1 + 1e-9)


def test_the_two_kinds_of_noise_stand_beside_each_other() -> None:
    gaussian, laplace = Policy(1, "gaussian", 9), Policy(1, "laplace", 9)
    assert not stricter(gaussian, laplace) and not stricter(laplace, gaussian)
    assert stricter(gaussian, Policy(1)) and stricter(laplace, Policy(1)) and stricter(Policy(1), Policy())


# --- what is said


@pytest.mark.parametrize(
    ("own", "floor", "words"),
    [
        (Policy(2), Policy(1), "clip 2, where at most 1 is allowed"),
        (Policy(), Policy(1), "no clip, where at most 1 is allowed"),
        (Policy(1 + 2**-52), Policy(1), "clip 1.0000000000000002, where at most 1 is allowed"),
        (Policy(1), Policy(1, "gaussian", 2), "no noise, where gaussian noise is demanded"),
        (Policy(1, "laplace", 9), Policy(1, "gaussian", 2), "laplace noise, where gaussian noise is demanded"),
        (Policy(1, "gaussian", 1.5), Policy(1, "gaussian", 2), "noise multiplier 1.5, where at least 2 is demanded"),
        (LabelPolicy(3, 10), LabelPolicy(2, 10), "epsilon 3 a label, where at most 2 is allowed"),
        (LabelPolicy(1, 9), LabelPolicy(2, 10), "9 classes, where the floor has 10"),
        (LabelPolicy(1, 11), LabelPolicy(2, 10), "11 classes, where the floor has 10"),
    ],
)
def test_what_goes_under_the_floor_is_said(own: Any, floor: Any, words: str) -> None:
    assert own.at_least(floor) == words


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(), "as it is"),
        (Policy(1.5), "clip 1.5"),
        (Policy(1, "gaussian", 2), "clip 1, gaussian 2"),
        (Policy(1, "laplace", 0.25), "L1 clip 1, laplace 0.25"),
        (LabelPolicy(1, 10), "randomised response 1 of 10 classes"),
    ],
)
def test_a_policy_in_words(policy: Policy | LabelPolicy, words: str) -> None:
    assert str(policy) == words


# --- what it costs


def test_the_mechanism_counts_the_numbers_of_one_sample() -> None:
    assert Policy(3, "gaussian", 2).mechanism((32, 7, 7)) == Gaussian(2.0, 1568)
    assert Policy(3, "laplace", 2).mechanism(()) == Laplace(2.0, 1)
    assert Policy(3).mechanism((8,)) is None and Policy().mechanism((8,)) is None
    assert LabelPolicy(1, 10).mechanism() == RandomisedResponse(1.0, 10)


def test_whole_numbers_are_the_same_policy() -> None:
    """Whoever matches on float must not miss a clip of 1."""
    policy = Policy(1, "gaussian", 2)
    assert policy == Policy(1.0, "gaussian", 2.0)
    assert [type(value) for value in (policy.clip, policy.noise_multiplier, LabelPolicy(1, 2).epsilon)] == [float] * 3


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0,), "clip is 0.0"),
        ((-1.0,), "clip is -1.0"),
        ((math.nan,), "clip is nan"),
        ((math.inf,), "clip is inf"),
        ((1.0, "gaussian", 0.0), "noise_multiplier is 0.0"),
        ((1.0, "gaussian"), "one without the other"),
        ((1.0, None, 2.0), "one without the other"),
        ((None, "gaussian", 2.0), "noise without clip"),
        ((1.0, "uniform", 2.0), "'gaussian', 'laplace' or None"),
    ],
)
def test_a_policy_that_promises_nothing_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(BadParameter, match=words):
        Policy(*arguments)


@pytest.mark.parametrize("arguments", [(0.0, 10), (math.nan, 10), (math.inf, 10), (-1.0, 10), (1.0, 1)])
def test_a_label_policy_that_promises_nothing_is_refused(arguments: Any) -> None:
    with pytest.raises(BadParameter):
        LabelPolicy(*arguments)
