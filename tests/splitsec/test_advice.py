"""Schedules played through: against the formula, and against counting on fingers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitsec.advice import Act, Crossing, Line, Pipeline, advise, lock_step, step_seconds

NONE = Act(0.0, 0.0)
AT_ONCE = Line(1e18, 0.0)


def pair(
    client: tuple[float, float, float], server: tuple[float, float, float], size: float = 1000.0, streams: int = 1
) -> Pipeline:
    """Two parties and one cut; seconds of a sample's forward, input gradient and weight gradient."""
    return Pipeline(
        names=("stem", "trunk"),
        acts=(tuple(Act(0.0, one) for one in client), tuple(Act(0.0, one) for one in server)),  # type: ignore[arg-type]
        parties=(tuple(f"clinic {stream}" for stream in range(streams)), ("server",) * streams),
        crossings=(Crossing(0, 1, size, size),),
        losses=frozenset({1}),
        streams=streams,
    )


@pytest.mark.parametrize("delay", [0.0, 0.025])
@pytest.mark.parametrize("bandwidth", [1e6, 12.5e6])
def test_lock_step_takes_what_the_formula_says(bandwidth: float, delay: float) -> None:
    """Compute, twice the line, and a round trip."""
    pipe = pair((1e-3, 0.0, 2e-3), (2e-3, 1e-3, 3e-3))
    expected = lock_step(64 * 9e-3, 64 * 1000 / bandwidth, delay)
    assert expected == pytest.approx(0.576 + 2 * 64_000 / bandwidth + 2 * delay)
    assert step_seconds(pipe, Line(bandwidth, delay), 64) == pytest.approx(expected, rel=1e-12)


def test_the_early_gradient_overlaps_the_servers_weights_with_the_clients_way_back() -> None:
    """Forward 1 + 2, input gradient 2, and then the longer of the server's weights (3) and the client's way back (2)
    with the next forward (1); the server's next forward waits for both.
    """
    pipe = pair((1.0, 0.0, 2.0), (2.0, 2.0, 3.0))
    assert step_seconds(pipe, AT_ONCE, 1) == pytest.approx(10)
    assert step_seconds(pipe, AT_ONCE, 1, early=True) == pytest.approx(7)


def test_a_slow_client_hides_all_of_the_servers_weights() -> None:
    pipe = pair((2.0, 0.0, 4.0), (1.0, 1.0, 1.0))
    assert step_seconds(pipe, AT_ONCE, 1, early=True) == pytest.approx(8)


def test_optimisers_take_their_time_once_a_step() -> None:
    """The client's ends a step, and the server's goes on beside the client's way back."""
    pipe = replace(pair((0.25, 0.0, 0.25), (0.25, 0.25, 0.0)), optimizers=(0.5, 2.0))
    assert step_seconds(pipe, AT_ONCE, 16) == pytest.approx(16.5)
    assert step_seconds(pipe, AT_ONCE, 16, micro_batches=4) == pytest.approx(10.5), "the server's is hidden"
    slow = replace(pipe, optimizers=(0.5, 4.0))  # from 9 to 13, while the next forward is there at 11.5
    assert step_seconds(slow, AT_ONCE, 16, micro_batches=4) == pytest.approx(12)
    assert "while the others wait: 18.5 s of computing" in advise(pipe, AT_ONCE, 16).reasons[1]


def test_micro_batches_fill_both_parties() -> None:
    """Four equal parts: the client begins the next while the server works; counted on fingers.

    Client: forwards end at 1, 2, 3, 4.  Server: (forward 1 + back 1 =) 2 for each, so gradients leave at 3, 5, 7, 9.
    Client goes back, 1 each, at once when one is there: it ends at 10, where lock-step takes 4 + 8 + 4.
    """
    pipe = pair((0.25, 0.0, 0.25), (0.25, 0.25, 0.0))
    assert step_seconds(pipe, AT_ONCE, 16) == pytest.approx(16)
    assert step_seconds(pipe, AT_ONCE, 16, micro_batches=4) == pytest.approx(10)


def test_weights_are_what_fills_the_gaps() -> None:
    """The server's weight gradients (1 each) no longer stand between two micro-batches, but at the end, where the
    client goes back and begins the next step: the server alone decides, 4 times 3.
    """
    pipe = pair((0.25, 0.0, 0.25), (0.25, 0.25, 0.25))
    late = step_seconds(pipe, AT_ONCE, 16, micro_batches=4)
    early = step_seconds(pipe, AT_ONCE, 16, micro_batches=4, early=True)
    assert late == pytest.approx(14)
    assert early == pytest.approx(12)


def test_who_has_the_loss_goes_back_at_once() -> None:
    """Forwards reach the server every second, and it needs two for each and two for the way back: gradients leave at 5,
    9, 13 and 17, and the client's 3 seconds each end at 20.  Forwards first, all gradients would come late, and it 23.
    """
    pipe = pair((0.25, 0.0, 0.75), (0.5, 0.5, 0.0))
    assert step_seconds(pipe, AT_ONCE, 16, micro_batches=4) == pytest.approx(20)


def test_a_line_carries_one_message_after_the_other_and_each_way_by_itself() -> None:
    """Eight parts of 1 s each way: the way back begins when the first part is there, 8 + 1 and the delay twice."""
    pipe = pair((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), size=100)
    assert step_seconds(pipe, Line(100, 0.5), 8) == pytest.approx(17)
    assert step_seconds(pipe, Line(100, 0.5), 8, micro_batches=8) == pytest.approx(10)


def test_a_group_at_once_waits_for_the_server_alone() -> None:
    pipe = pair((1.0, 0.0, 1.0), (1.0, 1.0, 1.0), streams=4)
    assert step_seconds(pipe, AT_ONCE, 1) == pytest.approx(12)  # four times 3 at the server, which never stands still
    alone = pair((1.0, 0.0, 1.0), (1.0, 1.0, 1.0))
    assert step_seconds(alone, AT_ONCE, 1) == pytest.approx(5)
    advice = advise(pipe, AT_ONCE, 1)
    assert advice.reasons[1] == "4 members of the group work at once; server computes longest, 12 s."


def test_three_parties_in_a_row_and_an_edge_that_stays() -> None:
    """A U shape: the client has the first and the last part, with an edge between the two that no line carries."""
    pipe = Pipeline(
        names=("stem", "trunk", "head"),
        acts=((Act(0, 1), NONE, Act(0, 1)), (Act(0, 2), Act(0, 2), NONE), (Act(0, 1), Act(0, 1), NONE)),
        parties=(("clinic",), ("server",), ("clinic",)),
        crossings=(Crossing(0, 1, 10, 10), Crossing(1, 2, 10, 10), Crossing(0, 2, 1e30, 1e30)),
        losses=frozenset({2}),
    )
    assert step_seconds(pipe, Line(10, 3), 1) == pytest.approx(8 + 4 * 1 + 4 * 3)
    assert advise(pipe, Line(10, 3), 1).reasons[1] == "All parties together compute for 8 s a step."


# --- the choice


def test_the_fastest_is_chosen_and_the_sentences_say_why() -> None:
    pipe = pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3))
    advice = advise(pipe, Line(1e6, 0.025), 128)
    assert advice.tried[0].name == "lock-step"
    assert advice.tried[0].seconds == pytest.approx(lock_step(0.64, 0.128, 0.025))
    assert {one.micro_batches for one in advice.tried} == set(range(1, 9))  # 128 / 8 = 16 samples
    fastest = min(advice.tried, key=lambda one: one.seconds)
    assert advice.chosen.early
    assert advice.chosen.seconds <= fastest.seconds / 0.98
    assert advice.chosen.seconds < 0.7 * advice.tried[0].seconds
    assert f"{advice.chosen.seconds / advice.tried[0].seconds:.2f} of the 946 ms of lock-step" in advice.reasons[0]
    assert advice.reasons[1] == (
        "In lock-step one party computes while the others wait: 640 ms of computing, and the line takes 306 ms "
        "(32% of the step)."
    )
    assert advice.reasons[-1] == (
        f"In the graph file: `training: {{micro_batches: {advice.chosen.micro_batches}}}`; now it is 1."
    )


def test_where_the_line_is_what_takes_longest_it_is_said() -> None:
    pipe = pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3))
    said = "which no schedule shortens"
    slow = advise(pipe, Line(1e5, 0.025), 128)
    assert slow.reasons[2] == (
        "The line from clinic 0 to server is busy for 1.28 s of it, which no schedule shortens: only a cut that less "
        "crosses would, or a codec (docs/codecs.md)."
    )
    assert slow.chosen.seconds > 1.28
    assert said not in " ".join(advise(pipe, Line(1e6, 0.025), 128).reasons), "0.128 of some 0.5 s"
    several = advise(pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3), streams=3), Line(1e5, 0.025), 128)
    assert "from clinic 0 to server is busy for 1.28 s" in " ".join(several.reasons), "each has a line of its own"


def test_batch_statistics_keep_batches_whole_but_not_the_early_gradient() -> None:
    pipe = pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3))
    why = "`stem` has BatchNorm2d, which looks at a whole batch, so micro-batches are refused there"
    advice = advise(pipe, Line(1e6, 0.025), 128, whole_batches=why)
    assert [one.name for one in advice.tried] == ["lock-step", "whole batches, early cut gradient"]
    assert advice.chosen.micro_batches == 1
    assert f"Batches stay whole: {why}." in advice.reasons
    off = advise(pipe, Line(1e6, 0.025), 128, whole_batches=why, may_be_early=False, now=4)
    assert off.chosen.name == "lock-step"
    assert off.reasons[0] == "Nothing that was tried is faster than lock-step, 946 ms a step."
    assert off.reasons[-1] == "In the graph file: `training: {micro_batches: 1}`; now it is 4."


def test_micro_batches_keep_sixteen_samples() -> None:
    pipe = pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3))
    assert {one.micro_batches for one in advise(pipe, AT_ONCE, 31).tried} == {1}
    assert {one.micro_batches for one in advise(pipe, AT_ONCE, 32).tried} == {1, 2}
    assert {one.micro_batches for one in advise(pipe, AT_ONCE, 4096).tried} == set(range(1, 17))
    assert "A batch of 31 cannot be cut" in " ".join(advise(pipe, AT_ONCE, 31).reasons)


def test_what_an_act_costs_once_speaks_against_many_parts() -> None:
    cheap = pair((1e-3, 0.0, 1e-3), (1e-3, 1e-3, 1e-3))
    acts = tuple(tuple(Act(0.1, act.each) for act in acts) for acts in cheap.acts)
    dear = Pipeline(cheap.names, acts, cheap.parties, cheap.crossings, cheap.losses)  # type: ignore[arg-type]
    line = Line(1e6, 0.0)
    assert advise(dear, line, 256).chosen.micro_batches < advise(cheap, line, 256).chosen.micro_batches


def test_alone_nothing_is_faster_than_lock_step() -> None:
    alone = Pipeline(("all",), ((Act(0, 1), NONE, Act(0, 1)),), (("one",),), (), frozenset({0}))
    advice = advise(alone, AT_ONCE, 64)
    assert (advice.chosen.name, advice.chosen.seconds) == ("lock-step", pytest.approx(128))
