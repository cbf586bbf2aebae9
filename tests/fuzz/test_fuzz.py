"""The short fuzzing run that is part of the suite, and the tool for the long one (``make fuzz``).

The same targets, with few inputs that are the same each time; a failure gives the bytes to begin with.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import __main__ as fuzz
from tests.fuzz import engines
from tests.fuzz.targets import TARGETS, load

INPUTS: Final = {
    "circuit": 200,
    "delivery": 150,
    "hostile": 700,
    "handshake": 400,
    "zmtp": 700,
    "record": 2000,
    "messages": 1500,
}


@pytest.mark.threat("T25")
@pytest.mark.parametrize("name", TARGETS)
def test_what_chance_makes_of_the_seeds(name: str) -> None:
    function, seeds = load(name)
    for number, data in enumerate(islice(engines.chance(seeds, 1, TARGETS[name].largest), INPUTS[name])):
        try:
            function(data)
        except Exception as error:
            error.add_note(f"input {number}: bytes.fromhex({data.hex()!r})")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_what_hypothesis_makes_of_nothing(name: str) -> None:
    function, _ = load(name)

    @seed(1)
    @settings(max_examples=INPUTS[name] // 10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        function(data)

    run()


# The tool.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = fuzz.main([*arguments, "--jobs", "2", "--seed", "1"])
    return code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a failure is no part of the tree."""
    monkeypatch.chdir(tmp_path)


def test_the_targets_share_what_there_is() -> None:
    assert sum(target.share for target in TARGETS.values()) == 1000


@pytest.mark.parametrize("name", TARGETS)
def test_no_seed_is_longer_than_an_input(name: str) -> None:
    assert max(map(len, load(name)[1])) <= TARGETS[name].largest


def test_it_runs_as_many_inputs_as_it_was_told(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "--inputs", "1000", "--target", "record", "--target", "tests.fuzz.planted:nothing")
    assert code == 0
    assert "1,000 inputs" in text
    assert "\nall                1,000" in text
    assert "seed 1\nnothing was found" in text


@pytest.mark.parametrize(
    ("name", "word"),
    [("error", "AssertionError: planted"), ("crash", "ended with "), ("hang", "no end"), ("glutton", "MemoryError")],
)
@pytest.mark.parametrize("engine", [engines.CHANCE, engines.ATHERIS])
def test_whatever_happens_the_input_is_kept(
    name: str, word: str, engine: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == engines.ATHERIS:
        pytest.importorskip("atheris")
    monkeypatch.setattr(fuzz, "HANG", 2.0)
    target = f"tests.fuzz.planted:{name}"
    code, text = run(capsys, "--target", target, "--engine", engine)
    assert code == 1
    assert word in text
    (kept,) = Path("out/fuzz").glob("*.bin")
    assert f"-m tests.fuzz --target {target} --replay {kept} --shrink" in text
    if name == "error":
        assert fuzz.main(["--target", target, "--replay", str(kept), "--shrink"]) == 1
        assert kept.with_suffix(".short.bin").read_bytes() == b"hh"
        assert fuzz.main(["--target", "tests.fuzz.planted:nothing", "--replay", str(kept)]) == 0
    else:
        assert b"too" in kept.read_bytes()


def test_without_atheris_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "best", lambda: engines.CHANCE)
    code, text = run(capsys, "--inputs", "100", "--target", "tests.fuzz.planted:nothing")
    assert code == 0
    assert text.startswith("atheris is not installed: inputs are left to chance")


@pytest.mark.parametrize("arguments", [["--target", "nobody"], ["--replay", "x"], ["--jobs", "0"], ["--inputs", "0"]])
def test_mistakes_are_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        fuzz.main(arguments)
    assert caught.value.code == 2
