"""Statistics of gradients against loops over pairs, and each rule on gradients whose answer is known.

The loops share nothing with the subject, which never forms a pair.  How often the rules are wrong about trainings is
measured by ``splitsec bench detectors``; two short runs of it stand at the end.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Final

import pytest
import torch

from splitsec.bench import detectors as bench
from splitsec.privacy import detection
from splitsec.privacy.detection import (
    Answer,
    DecoyRule,
    Gradients,
    LabelRule,
    Likeness,
    LossRule,
    OneWayRule,
    ReplayRule,
    SizeRule,
    answer,
    false_order,
    likeness,
)

EXAMPLES: Final = Path(bench.__file__).parents[2] / "examples"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def of_classes(labels: torch.Tensor, *, classes: int = 4, seed: int = 0, sharp: float = 1.0) -> torch.Tensor:
    """Gradients as softmax and cross entropy give them through one linear layer: ``(p - e_y) W``, float32."""
    chances = torch.softmax(sharp * draw(len(labels), classes, seed=seed), 1)
    return (chances - torch.nn.functional.one_hot(labels, classes)) @ draw(classes, 12, seed=99)


def of_a_discriminator(rows: int, *, seed: int = 0, spread: float = 0.3) -> torch.Tensor:
    """Gradients that all pull one way, whatever the label."""
    return draw(1, 12, seed=7) + spread * draw(rows, 12, seed=seed)


def labels_of(rows: int, *, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))


# --- likeness


def naive(rows: torch.Tensor, labels: torch.Tensor, power: float) -> tuple[float, float]:
    """Mean cosine of same-label and of other pairs, every pair counted by the product of its norms to ``power``."""
    sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
    flat = rows.double().flatten(1)
    there = [place for place in range(len(flat)) if float(flat[place].abs().max()) > 0]
    for i, j in combinations(there, 2):
        one, other = flat[i], flat[j]
        lengths = math.sqrt(sum(float(v) ** 2 for v in one)) * math.sqrt(sum(float(v) ** 2 for v in other))
        cosine = sum(float(a) * float(b) for a, b in zip(one, other, strict=True)) / lengths
        kept = sums[bool(labels[i] == labels[j])]
        kept[0] += lengths**power * cosine
        kept[1] += lengths**power
    return sums[True][0] / sums[True][1], sums[False][0] / sums[False][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 2)])
def test_likeness_is_what_a_loop_over_pairs_finds(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = (draw(11, *shape, seed=1) * draw(11, *[1] * len(shape), seed=2).exp()).to(dtype)
    rows[3] = 0
    labels = labels_of(11, classes=3, seed=4)
    seen = likeness(Gradients(rows), labels)
    assert seen is not None
    same, other = naive(rows, labels, 0.0)
    assert (seen.same_mean, seen.other_mean, seen.agreement) == pytest.approx((same, other, same - other), abs=2e-5)
    half, heavy = naive(rows, labels, 0.5), naive(rows, labels, 1.0)
    assert seen.half_same / seen.half_same_weight == pytest.approx(half[0], abs=2e-5)
    assert seen.heavy_same / seen.heavy_same_weight == pytest.approx(heavy[0], abs=2e-5)
    assert seen.common == pytest.approx(min(half[1], heavy[1]), abs=2e-5)
    kept = [int(label) for place, label in enumerate(labels) if place != 3]
    assert seen.same_pairs == sum(a == b for a, b in combinations(kept, 2))
    assert seen.same_pairs + seen.other_pairs == 45
    assert seen.outside == 10 - max(kept.count(label) for label in kept)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e-9, 1e9, 1e20, 1e37])
def test_likeness_does_not_depend_on_how_large_gradients_are(scale: float) -> None:
    rows, labels = of_classes(labels_of(32)), labels_of(32)
    plain, scaled = likeness(Gradients(rows), labels), likeness(Gradients(rows * scale), labels)
    assert plain is not None and scaled is not None
    assert scaled.other_mean == pytest.approx(plain.other_mean, abs=1e-4)
    assert scaled.common == pytest.approx(plain.common, abs=1e-4)
    assert Gradients(rows * scale).norms.tolist() == pytest.approx(
        (rows.double() * scale).norm(dim=1).tolist(), rel=1e-3
    )


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (torch.zeros(8, 3), labels_of(8)),
        (draw(8, 3), torch.ones(8).long()),
        (draw(1, 3), torch.ones(1).long()),
        (draw(0, 3), torch.ones(0).long()),
        (torch.cat([draw(4, 3), torch.zeros(4, 3)]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])),
    ],
    ids=["no gradient", "one label", "one row", "no row", "a gradient for one label only"],
)
def test_likeness_says_nothing_where_no_two_labels_can_be_compared(rows: torch.Tensor, labels: torch.Tensor) -> None:
    assert likeness(Gradients(rows), labels) is None


# --- label agreement


def judged(rule: LabelRule, rows: torch.Tensor, labels: torch.Tensor) -> bool | None:
    seen = rule.add(likeness(Gradients(rows), labels))
    return None if seen is None else LabelRule.suspicious(seen)


@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("batch", [16, 64])
def test_gradients_of_a_loss_on_labels_are_let_pass_from_the_first_weights_to_the_last(
    classes: int, batch: int
) -> None:
    for sharp in (0.01, 1.0, 10.0):
        rule = LabelRule()
        for step in range(30):
            labels = labels_of(batch, classes=classes, seed=step)
            assert judged(rule, of_classes(labels, classes=classes, seed=step, sharp=sharp), labels) is not True


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("skewed", [False, True])
def test_gradients_that_no_label_enters_are_seen_after_five_batches(batch: int, skewed: bool) -> None:
    rule = LabelRule()
    said = []
    for step in range(10):
        labels = labels_of(batch, seed=step)
        if skewed:
            labels[labels_of(batch, classes=10, seed=50 + step) > 0] = 0
        said.append(judged(rule, of_a_discriminator(batch, seed=step), labels))
    assert True in said
    assert said.index(True) in ((4,) if not skewed else range(4, 9))
    assert said[:4] == [None] * 4


def test_an_attack_that_begins_late_is_seen_within_ten_batches() -> None:
    rule = LabelRule()
    for step in range(40):
        labels = labels_of(32, seed=step)
        assert not judged(rule, of_classes(labels, seed=step), labels)
    later = [judged(rule, of_a_discriminator(32, seed=step), labels_of(32, seed=step)) for step in range(10)]
    assert True in later


def test_a_network_that_says_one_class_for_all_is_honest() -> None:
    """The extreme of an honest loss: half of what rows have in common is then no fault of the peer."""
    rule = LabelRule()
    for step in range(20):
        labels = 1 + labels_of(32, classes=9, seed=step)
        wrong = torch.nn.functional.one_hot(torch.zeros(32).long(), 10).double()
        rows = (wrong - torch.nn.functional.one_hot(labels, 10)).float() @ torch.eye(10)
        seen = rule.add(likeness(Gradients(rows), labels))
        if seen is not None:
            assert (seen.other_mean, seen.share) == pytest.approx((0.5, 0.5), abs=1e-3)
            assert not LabelRule.suspicious(seen)


def test_a_few_rows_do_not_speak_for_a_batch() -> None:
    """Tiny rows that all agree, or one large one: a converged network makes either."""
    honest, alike = of_classes(labels_of(32)), of_a_discriminator(32, spread=0.01)
    for rows in (torch.cat([honest[:8], 1e-3 * alike[8:]]), torch.cat([alike[:1], 1e-3 * honest[1:]])):
        rule = LabelRule()
        assert not any(judged(rule, rows, labels_of(32)) for _ in range(10))


@pytest.mark.parametrize("part", [6, 12, 20])
def test_answering_some_rows_with_next_to_nothing_hides_nothing(part: int) -> None:
    rule = LabelRule()
    said = []
    for step in range(10):
        labels = labels_of(32, seed=step)
        rows = torch.cat([of_a_discriminator(32, seed=step)[:part], 1e-3 * of_classes(labels, seed=step)[part:]])
        said.append(judged(rule, rows, labels))
    assert True in said


def test_few_pairs_wait_for_more_and_are_never_enough_alone() -> None:
    rule = LabelRule()
    said = [judged(rule, of_a_discriminator(2, seed=step), torch.tensor([0, 1])) for step in range(12)]
    assert said[:7] == [None] * 7, "two rows of two labels say little"
    assert said[7] is True, "no same-label pair at all: compared with 1"


def test_batches_without_a_second_label_neither_help_nor_harm() -> None:
    rule = LabelRule()
    for step in range(30):
        assert judged(rule, of_a_discriminator(16, seed=step), torch.zeros(16).long()) is None
    said = [judged(rule, of_a_discriminator(16, seed=step), labels_of(16, seed=step)) for step in range(5)]
    assert said == [None] * 4 + [True]


def test_rows_that_have_little_in_common_with_anything_are_honest() -> None:
    """What a deep network's gradients are like: nearly orthogonal, whatever the label."""
    rule = LabelRule()
    for step in range(20):
        rows, labels = of_a_discriminator(64, seed=step, spread=1.4), labels_of(64, seed=step)
        seen = rule.add(likeness(Gradients(rows), labels))
        if seen is not None:
            assert seen.share > detection.SHARED
            assert 0.2 < seen.common < detection.COMMON
            assert not LabelRule.suspicious(seen)


def test_rows_without_a_direction_in_float32_are_left_out() -> None:
    rows = of_classes(labels_of(16))
    rows[5:] *= 1e-17
    seen = likeness(Gradients(rows), labels_of(16))
    assert seen is not None
    assert seen.same_pairs + seen.other_pairs == 10


def test_what_cannot_be_said_is_above_no_threshold() -> None:
    alone = torch.zeros(8, 12)
    alone[0], alone[1:] = 1.0, 1e-14  # counted by norms, one row is all there is
    rule = LabelRule()
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    assert not any(judged(rule, alone, labels) for _ in range(20))
    assert not LabelRule.suspicious(Likeness(half_other=0.9, half_other_weight=1.0))
    assert not LabelRule.suspicious(Likeness(heavy_other=0.9, heavy_other_weight=1.0))


def test_sums_of_steps_weigh_every_step_alike() -> None:
    labels = labels_of(16)
    one, other = likeness(Gradients(of_classes(labels)), labels), likeness(Gradients(1e-6 * draw(16, 12)), labels)
    assert one is not None and other is not None
    both = one + other
    assert both.other_mean == pytest.approx((one.other + other.other) / (one.other_weight + other.other_weight))
    assert one.same_weight + one.other_weight == pytest.approx(1.0)
    assert Likeness() + one == one


# --- decoys


@pytest.mark.parametrize("labels", [labels_of(32), labels_of(32).float().unsqueeze(1), draw(32, 1)])
def test_a_false_order_moves_most_labels_and_leaves_a_control(labels: torch.Tensor) -> None:
    orders = set()
    for seed in range(20):
        order = false_order(labels, torch.Generator().manual_seed(seed))
        assert order is not None
        assert sorted(order.tolist()) == list(range(32))
        changed = (labels[order] != labels).reshape(32, -1).any(1)
        assert detection.LEAST_CHANGED <= int(changed.sum()) <= 24
        assert int((order == torch.arange(32)).sum()) >= 8
        orders.add(tuple(order.tolist()))
    assert len(orders) == 20


def test_there_is_no_false_order_of_labels_that_are_nearly_all_the_same() -> None:
    assert false_order(torch.zeros(64).long(), torch.Generator()) is None
    assert false_order(torch.tensor([0] * 63 + [1]), torch.Generator()) is None
    assert false_order(torch.tensor([0, 1]), torch.Generator()) is None
    assert false_order(torch.tensor([0] * 60 + [1] * 4), torch.Generator().manual_seed(1)) is not None


def test_an_answer_is_how_much_rows_changed_over_their_lengths() -> None:
    real = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [0.0, 0.0], [1.0, 1.0]])
    decoy = torch.tensor([[-3.0, -4.0], [0.0, 1.0], [2.0, 0.0], [0.0, 15.0], [0.0, 0.0], [1.0, 1.0]])
    changed = torch.tensor([True, True, True, True, True, False])
    seen = answer(decoy, real, changed)
    assert seen is not None
    assert seen.changed == pytest.approx((1.0 + math.sqrt(2) / 2 + 0.0 + 0.5) / 4), (
        "a row without gradients says nothing"
    )
    assert (seen.control, seen.rows) == (0.0, 4)
    tiny = answer(decoy * 1e-30, real * 1e-30, changed)
    assert tiny is not None and tiny.changed == pytest.approx(seen.changed)
    assert answer(decoy, real, torch.tensor([True, True, True, False, False, False])) is None
    assert answer(torch.zeros(6, 2), torch.zeros(6, 2), changed) is None


def test_a_peer_that_heeds_labels_passes_a_decoy_and_one_that_does_not_fails_it() -> None:
    for seed in range(20):
        labels = labels_of(32, seed=seed)
        order = false_order(labels, torch.Generator().manual_seed(seed))
        assert order is not None
        changed = labels[order] != labels
        heeding = answer(of_classes(labels[order], seed=seed), of_classes(labels, seed=seed), changed)
        assert heeding is not None and heeding.control == 0.0
        assert not DecoyRule(classes=True).suspicious(heeding)
        same = of_a_discriminator(32, seed=seed)
        after_a_step = same + 0.05 * draw(32, 12, seed=seed + 100)
        for other in (same, after_a_step):
            seen = answer(other, same, changed)
            assert seen is not None and DecoyRule(classes=True).suspicious(seen)


def test_other_losses_need_two_decoys_in_a_row() -> None:
    rule = DecoyRule(classes=False)
    ignored, heeded, little = Answer(0.1, 0.1, 9), Answer(0.5, 0.0, 9), Answer(0.001, 0.0, 9)
    assert [rule.suspicious(one) for one in (ignored, heeded, ignored, ignored)] == [False, False, False, True]
    rule = DecoyRule(classes=False)
    assert not any(rule.suspicious(little) for _ in range(9)), "far from its target a label moves a gradient little"
    assert DecoyRule(classes=True).suspicious(little)


# --- without labels


def test_sizes_that_training_makes_are_let_pass_and_others_are_not() -> None:
    rule = SizeRule()
    norms = [0.5, 2.0, *([1.5] * 30), 900.0, 1e-9, 1.5]
    assert not any(rule.suspicious(norm) for norm in norms)
    assert rule.largest == 900.0
    assert rule.suspicious(2e6)
    converged = SizeRule()
    assert not any(converged.suspicious(norm) for norm in [1e-12] * 30 + [900.0]), "its next hard sample"
    assert converged.suspicious(1.1e6)
    at_once = SizeRule()
    assert not at_once.suspicious(1e9), "numbers that were never scaled"
    assert at_once.suspicious(2e10)
    silent = SizeRule()
    assert not any(silent.suspicious(0.0) for _ in range(50))
    assert not silent.suspicious(1e5), "no step with a gradient came before"


def test_rows_that_all_point_one_way_are_told_from_others() -> None:
    rule = OneWayRule()
    means = [rule.add(Gradients(of_a_discriminator(16, seed=step))) for step in range(20)]
    assert means[:19] == [None] * 19
    assert means[19] is not None and OneWayRule.suspicious(means[19])
    rule = OneWayRule()
    means = [rule.add(Gradients(of_classes(labels_of(16, seed=step), seed=step))) for step in range(40)]
    assert means[39] is not None and not OneWayRule.suspicious(means[39])
    for parts in ((1e-3, 1.0), (1.0, 1e-3)):  # a few large rows that agree, or many tiny ones
        rule = OneWayRule()
        for step in range(20):
            alike = of_a_discriminator(32, seed=step, spread=0.01)
            mixed = torch.cat([alike[:8], of_classes(labels_of(32, seed=step), seed=step)[8:]])
            mean = rule.add(Gradients(torch.cat([mixed[:8] * parts[0], mixed[8:] * parts[1]])))
        assert mean is not None and not OneWayRule.suspicious(mean)
    rule = OneWayRule()
    assert all(rule.add(Gradients(of_a_discriminator(7))) is None for _ in range(40)), "too few rows"


def test_the_same_gradients_are_known_again() -> None:
    rule = ReplayRule()
    sent = [of_classes(labels_of(16, seed=step), seed=step) for step in range(60)]
    assert [rule.add(step, Gradients(one)) for step, one in enumerate(sent)] == [None] * 60
    assert rule.add(60, Gradients(sent[58])) == 58
    assert rule.add(61, Gradients(sent[5])) is None, "forgotten"
    assert rule.add(62, Gradients(torch.zeros(16, 12))) is None
    assert rule.add(63, Gradients(torch.zeros(16, 12))) is None
    assert rule.add(64, Gradients(sent[59][torch.randperm(16)])) is None


# --- the loss


def test_a_loss_that_never_falls_is_told_and_one_that_does_is_not() -> None:
    rule = LossRule()
    said = [rule.add(2.3 + 0.01 * math.sin(step)) for step in range(250)]
    assert set(said[: detection.LOSS_STEPS - 1]) == {None}
    assert said[detection.LOSS_STEPS - 1] == "never fell"
    rule = LossRule()
    assert {rule.add(2.3 * 0.99**step) for step in range(2000)} == {None}
    rule = LossRule()
    assert {rule.add(0.5 if step < 300 else 0.6) for step in range(600)} <= {None, "never fell"}
    rule = LossRule()
    assert "exploded" in [rule.add(0.5 * 1.05**step) for step in range(100)]


# --- real trainings, in short


@pytest.fixture(scope="module")
def table() -> bench.Data:
    return bench.data_sets(EXAMPLES)["cancer"]


@pytest.mark.threat("T110")
@pytest.mark.parametrize("case", [one for one in bench.HONEST if one.task is bench.TABLE and not one.before])
def test_short_honest_trainings_raise_no_alarm(case: bench.Honest, table: bench.Data) -> None:
    record = bench._watched(case.name, case.batch, bench._honest(case, table, 150, seed=5))
    assert record.batches == 150
    assert (record.stopped, record.decoy_alarms, record.size_alarms, record.replays) == (None, 0, 0, 0)
    assert record.changed or case.one_label


def test_the_curve_and_the_tables_are_made_from_the_runs(table: bench.Data, capsys: pytest.CaptureFixture[str]) -> None:
    honest, attack = bench.HONEST[12], next(one for one in bench.ATTACKS if one.task is bench.TABLE)
    records = {
        "honest": [bench._watched(honest.name, honest.batch, bench._honest(honest, table, 60, seed=1))],
        "attacks": [bench._watched(f"attack: {attack.name}", attack.batch, bench._attacked(attack, table, 1))],
    }
    curves = bench.curves(records)
    at = {name: {threshold: shares for threshold, *shares in points} for name, points in curves.items()}
    assert at["common"][detection.COMMON] == [0.0, 1.0]
    assert at["common"][-0.2][1] == 1.0 and at["common"][1.0] == [0.0, 0.0]
    assert at["changed"][detection.HEEDED] == [0.0, 1.0]
    price = bench.cost(3)
    bench._print({"runs": {name: [asdict(one) for one in group] for name, group in records.items()}, "cost": price})
    printed = capsys.readouterr().out
    assert f"| {honest.name} | 16 | 60 | no |" in printed
    assert f"| {attack.name} | 1 | 1 | 5 to 5 |" in printed
    assert price["without_labels_ms"] > 0 and price["share"] == price["with_labels_ms"] / bench.STEP_MS


@pytest.mark.threat("T110")
@pytest.mark.parametrize("case", [one for one in bench.ATTACKS if one.task is bench.TABLE])
@pytest.mark.parametrize("seed", [31, 32])
def test_hijackings_are_seen_within_ten_batches(case: bench.Attack, seed: int, table: bench.Data) -> None:
    record = bench._watched(case.name, case.batch, bench._attacked(case, table, seed), after=case.after)
    assert record.stopped is not None and record.stopped <= bench.SOON
    assert record.decoy_alarms == 1
