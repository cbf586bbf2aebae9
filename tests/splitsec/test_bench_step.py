"""``splitsec bench step`` on a network so small that it takes seconds: its figures mean nothing, its checks all run."""

from __future__ import annotations

import json

import pytest

from splitsec.bench import step
from splitsec.bench.step import FIGURES, GROUPS, Figure, Group, Line, Way, as_json, bench_step
from splitsec.cli import main

LINE = Line(rate=1e6, delay=0.01)
SMALL = Group(
    "mlp",
    {
        "one": Way(one=True),
        "early": Way(early=True),
        "slices": Way(micro_batches=4, early=True),
        "clients": Way(clients=2),
        "bare": Way(plaintext=True),
        "slow": Way(line=LINE),
        "nonzero": Way(codec="nonzero"),
        "rounded": Way(codec="bfloat16"),
    },
    steps=3,
)


def test_every_way_ends_with_the_weights_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GROUPS, "small", SMALL)
    figures = [
        Figure(name, name, "small", name, ("one",), 9, 9)
        for name in ("early", "slices", "clients", "bare", "nonzero", "rounded")
    ]
    figures.append(Figure("slow", "slow", "small", "slow", (step.FORMULA,), 9, 9))
    figures.append(Figure("bytes", "bytes", "small", "nonzero", ("early",), 9, 9, "bytes"))
    figures.append(Figure("half", "half", "small", "rounded", ("early",), 9, 9, "bytes"))
    results = {result.name: result for result in bench_step(figures, rounds=1)}
    assert {name: result.equal for name, result in results.items()} == {
        **dict.fromkeys(("early", "slices", "clients", "bare", "nonzero", "slow", "bytes"), True),
        "rounded": None,
        "half": None,
    }
    assert 0.95 < results["slow"].ratio < 2.0  # 132 KB both ways at 1 MB/s and 20 ms: the line is nearly all of it
    assert results["slow"].milliseconds["slow"] > 150
    assert 0.50 < results["half"].ratio < 0.52
    assert 0.40 < results["bytes"].ratio < 0.70
    document = as_json(list(results.values()))
    assert [figure["name"] for figure in document["figures"]] == list(results)


def test_every_figure_names_ways_that_its_group_has() -> None:
    for figure in FIGURES:
        ways = GROUPS[figure.group].ways
        assert {figure.over, *figure.under} <= {*ways, step.FORMULA}
        assert figure.aim <= figure.accept


def test_a_figure_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--figure", "erly"]) == 2
    assert "no figure 'erly'" in capsys.readouterr().err


def test_weights_that_differ_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    group = Group("mlp", {"one": Way(one=True), "early": Way(early=True)}, steps=2)
    monkeypatch.setitem(GROUPS, "small", group)
    monkeypatch.setattr(step, "FIGURES", (Figure("early", "early", "small", "early", ("one",), 9, 9),))
    monkeypatch.setattr(step, "LEARNING_RATE", 0.01)
    plain = step._OneProcess.__init__

    def other(self: step._OneProcess, *arguments: object) -> None:
        plain(self, *arguments)  # type: ignore[arg-type]
        self.optimizer.param_groups[0]["lr"] = 0.02

    monkeypatch.setattr(step._OneProcess, "__init__", other)
    assert main(["bench", "step", "--json", "--rounds", "1"]) == 1
    assert json.loads(capsys.readouterr().out)["figures"][0]["equal"] is False


def test_no_party_but_its_own_stops_encrypting(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitsec.bench import networks, plaintext
    from splitsec.errors import UserError
    from splitsec.transports import record

    cipher = record._cipher
    for set_to in (None, "1", "999999999"):
        monkeypatch.delenv(plaintext.MEASURING, raising=False)
        if set_to is not None:
            monkeypatch.setenv(plaintext.MEASURING, set_to)
        if set_to != "1":
            with pytest.raises(UserError, match="a party without encryption"):
                networks.client("mlp", plaintext=True)
    assert record._cipher is cipher
