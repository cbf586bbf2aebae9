"""What ``splitsec bench channel`` says of the handshake: every figure is there, and both ways were really gone."""

from __future__ import annotations

import pytest

from splitsec.bench import handshake
from splitsec.bench.handshake import handshake_times
from splitsec.transports.handshake import Initiator


def test_every_figure_is_there_and_adds_up() -> None:
    times = handshake_times(rounds=1)
    assert set(times) == {
        "plain_ms",
        "plain_initiator_ms",
        "plain_responder_ms",
        "hybrid_ms",
        "hybrid_initiator_ms",
        "hybrid_responder_ms",
        "added_ms",
        "ratio",
    }
    for way in ("plain", "hybrid"):
        assert times[f"{way}_ms"] == pytest.approx(times[f"{way}_initiator_ms"] + times[f"{way}_responder_ms"])
    assert times["added_ms"] == pytest.approx(times["hybrid_ms"] - times["plain_ms"])
    assert times["ratio"] == pytest.approx(times["hybrid_ms"] / times["plain_ms"])
    assert min(times["plain_initiator_ms"], times["plain_responder_ms"]) > 0


def test_each_round_goes_both_ways_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[int] = []

    class Watched(Initiator):  # type: ignore[misc]  # final: looked at, not changed
        def start(self) -> None:
            super().start()
            gone.append(len(self._outbox[0]))

    monkeypatch.setattr(handshake, "Initiator", Watched)
    handshake_times(rounds=2)
    plain, hybrid = 113, 1297
    assert gone == [plain, hybrid, plain, hybrid, hybrid, plain]  # the first two do not count
