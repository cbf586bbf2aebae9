"""Attacks against defences, one table for each attack: what the attacker got, and what the defence cost.

    python examples/attacks/side_by_side.py --data cancer
    python examples/attacks/side_by_side.py --data digits --attacks hijacking,inversion --defences none,quantised

Each defence is a copy of a folder here (digits: 5,000 real images; cancer: 569 real patients) with a few lines changed;
they are written to OUT/<data>/<defence>, so that you can look at them and run `splitsec attack` on one yourself.
Each is trained once in peace for its accuracy, then attacked.  Results are kept in OUT/results.json as they come:
a run that was stopped goes on where it was.  The tables are printed, and written to OUT/tables.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
Change = Callable[[dict[str, Any], dict[str, dict[str, Any]]], None]
"""Changes the graph file and the party files, which are plain dictionaries here."""

ATTACKS = {
    "digits": ("hijacking", "inversion", "simulator", "unsplit", "label-inference", "membership"),
    "cancer": ("hijacking", "inversion", "simulator", "unsplit", "label-inference", "membership"),
}
CLIP = {"digits": 8.0, "cancer": 3.0}
"""What activations are clipped to before noise: some three times their median norm before training."""


@dataclass(frozen=True)
class Defence:
    """One row: what it is called, and what it changes in each folder."""

    name: str
    what: str
    digits: Change
    cancer: Change


def nothing(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """Nothing but that nobody looks at gradients."""
    for one in parties.values():
        one["detectors"] = False


def detectors(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """As the folder is: detectors are on where nothing is said."""


def deeper(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """The cut behind two more layers."""
    nothing(graph, parties)
    graph["cuts"][0]["shape"] = [64] if graph["name"] == "digits" else [4]
    for one in parties.values():
        for code in one["segments"].values():
            code["args"] = {"deep": True}


def nopeek(alpha: float) -> Change:
    """NoPeek at the segment that reads the data."""

    def change(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
        nothing(graph, parties)
        source = graph["cuts"][0]["from"]
        parties[graph["segments"][source]["at"]]["segments"][source]["nopeek"] = alpha

    return change


def noise(multiplier: float) -> Change:
    """Clipping and Gaussian noise on activations."""

    def change(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
        nothing(graph, parties)
        safeguard = {"clip": CLIP[graph["name"]], "noise": "gaussian", "noise_multiplier": multiplier}
        graph["cuts"][0]["privacy"] = {"forward": safeguard}

    return change


def backward(clip: float, multiplier: float | None = None) -> Change:
    """Clipping, or clipping and noise, on the gradients that go back."""

    def change(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
        nothing(graph, parties)
        safeguard: dict[str, Any] = {"clip": clip}
        if multiplier is not None:
            safeguard |= {"noise": "gaussian", "noise_multiplier": multiplier}
        graph["cuts"][0]["privacy"] = {"backward": safeguard}

    return change


def flipped_labels(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """Randomised response on the labels that the server gets."""
    nothing(graph, parties)
    graph["labels"][0]["privacy"] = {"epsilon": 3.0, "classes": 10}


def u_shape_of_digits(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """The last layer and the loss at the clinic."""
    nothing(graph, parties)
    graph["segments"] = {
        "stem": {"at": "clinic", "data": "x"},
        "trunk": {"at": "server"},
        "head": {"at": "clinic", "loss": "cross_entropy"},
    }
    graph["cuts"].append({"from": "trunk", "to": "head", "shape": [64], "dtype": "float32"})
    graph["labels"][0]["to"] = "head"
    parties["server"]["segments"]["trunk"]["args"] = {"headless": True}
    parties["clinic"]["segments"]["head"] = {"model": "models:head", "optimizer": {"name": "adam", "lr": 0.001}}


def u_shape_of_cancer(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
    """A third party computes the middle; the registry keeps the last layer and the diagnoses."""
    nothing(graph, parties)
    graph["parties"] = {"hospital": {}, "registry": {}, "server": graph["parties"]["registry"]}
    graph["segments"] = {
        "measurements": {"at": "hospital", "data": "x"},
        "middle": {"at": "server"},
        "last": {"at": "registry", "loss": "bce_with_logits"},
    }
    graph["cuts"] = [
        {"from": "measurements", "to": "middle", "shape": [16], "dtype": "float32"},
        {"from": "middle", "to": "last", "shape": [16], "dtype": "float32"},
    ]
    graph["labels"][0]["to"] = "last"
    optimizer = {"name": "adam", "lr": 0.003}
    parties["registry"]["segments"] = {"last": {"model": "models:last", "optimizer": optimizer}}
    parties["server"] = {
        "party": "server",
        "segments": {"middle": {"model": "models:middle", "optimizer": optimizer}},
        "threads": 1,
        "detectors": False,
    }


def rounded(levels: int) -> Change:
    """Activations rounded to a few values."""

    def change(graph: dict[str, Any], parties: dict[str, dict[str, Any]]) -> None:
        nothing(graph, parties)
        source = graph["cuts"][0]["from"]
        parties[graph["segments"][source]["at"]]["segments"][source]["args"] = {"levels": levels}

    return change


DEFENCES = (
    Defence("none", "nothing", nothing, nothing),
    Defence("detectors", "the detectors that are on by default", detectors, detectors),
    Defence("deeper", "the cut behind two more layers", deeper, deeper),
    Defence("nopeek", "NoPeek, alpha 2", nopeek(2.0), nopeek(2.0)),
    Defence("noise-0.02", "Gaussian noise, multiplier 0.02", noise(0.02), noise(0.02)),
    Defence("noise-0.2", "Gaussian noise, multiplier 0.2", noise(0.2), noise(0.2)),
    Defence("noise-2", "Gaussian noise, multiplier 2", noise(2.0), noise(2.0)),
    Defence("gradient-clip", "gradients clipped", backward(0.001), backward(0.001)),
    Defence("u-shape", "U shape", u_shape_of_digits, u_shape_of_cancer),
    Defence("quantised", "activations rounded to 4 values", rounded(4), rounded(4)),
    Defence("labels", "labels protected", flipped_labels, backward(0.001, 1.0)),
)
"""``labels``: on digits randomised response (epsilon 3 a label), on cancer, where labels do not leave, noise on the
gradients."""


def main() -> int:
    """Read the command line, run what is not in the results yet, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog="Takes about two hours for all of it on two cores, 15 minutes of them for cancer; "
        "--batches 200 gives a first impression.",
    )
    parser.add_argument("--data", choices=sorted(ATTACKS), action="append", help="which folder; both without it")
    parser.add_argument("--attacks", help="names with commas between; without it, all that look at a cut")
    parser.add_argument("--defences", help=f"names with commas between: {', '.join(one.name for one in DEFENCES)}")
    parser.add_argument("--batches", type=int, help="training batches of an attack, in place of its own number")
    parser.add_argument("--out", type=Path, default=Path("out/attacks"), help="folder for results (out/attacks)")
    given = parser.parse_args()
    wanted = given.defences.split(",") if given.defences else [one.name for one in DEFENCES]
    if unknown := set(wanted) - {one.name for one in DEFENCES}:
        parser.error(f"no defence {', '.join(sorted(unknown))}")
    given.out.mkdir(parents=True, exist_ok=True)
    results = Results(given.out / "results.json")
    for data in given.data or sorted(ATTACKS):
        attacks = given.attacks.split(",") if given.attacks else ATTACKS[data]
        for defence in (one for one in DEFENCES if one.name in wanted):
            folder = write_folder(given.out / data / defence.name, data, defence)
            results.fill(data, defence, folder, attacks, given.batches)
    tables = results.tables()
    (given.out / "tables.md").write_text(tables)
    print(tables)
    return 0


def write_folder(place: Path, data: str, defence: Defence) -> Path:
    """A copy of the folder of ``data`` with ``defence`` in it."""
    if place.exists():
        shutil.rmtree(place)
    (place / "parties").mkdir(parents=True)
    graph = yaml.safe_load((HERE / data / "graph.yaml").read_text())
    files = sorted((HERE / data / "parties").iterdir())
    parties = {file.stem: yaml.safe_load(file.read_text()) for file in files if file.suffix == ".yaml"}
    getattr(defence, data)(graph, parties)
    (place / "graph.yaml").write_text(f"# {defence.what}\n" + yaml.safe_dump(graph, sort_keys=False))
    for name, party in parties.items():
        (place / "parties" / f"{name}.yaml").write_text(yaml.safe_dump(party, sort_keys=False))
    for file in files:
        if file.suffix == ".py":
            shutil.copy(file, place / "parties")
    return place


class Results:
    """What was found, by data, attack and defence; written to ``file`` after each run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def fill(self, data: str, defence: Defence, folder: Path, attacks: tuple[str, ...], batches: int | None) -> None:
        """Run what is missing of ``attacks`` against one defence."""
        from splitsec.attacks.arena import Ground
        from splitsec.attacks.catalogue import load

        row: dict[str, Any] = self.found.setdefault(data, {}).setdefault(defence.name, {"what": defence.what})
        if "accuracy" not in row:
            self._said(f"{data}, {defence.what}: in peace")
            row |= peace(folder)
            self._keep()
        for name in attacks:
            if name in row:
                continue
            self._said(f"{data}, {defence.what}: {name}")
            began = time.monotonic()
            with Ground(folder, batches=batches) as ground:
                row[name] = load(name).run(ground).as_json()
            self._said(f"  {time.monotonic() - began:.0f} s: {row[name]['sentence']}")
            self._keep()

    def tables(self) -> str:
        """One table in Markdown for each set of data and attack."""
        lines: list[str] = []
        for data, rows in sorted(self.found.items()):
            for attack in dict.fromkeys(name for row in rows.values() for name in row if name in ALL_ATTACKS):
                lines += table(data, attack, rows)
        return "\n".join(lines)

    def _keep(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1))
        partial.replace(self.file)

    @staticmethod
    def _said(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


ALL_ATTACKS = {name for names in ATTACKS.values() for name in names}


def peace(folder: Path) -> dict[str, Any]:
    """The accuracy that a defence leaves, and the epsilon of its noise where it has any."""
    from splitsec.simulation import simulate

    with tempfile.TemporaryDirectory() as state:  # a ledger of its own: each defence is measured from the start
        result = simulate(folder, state=state)
    return {"accuracy": max(result.metrics["eval_accuracy"][-3:]), "epsilon": epsilon_of(folder, result.epochs)}


def epsilon_of(folder: Path, epochs: int) -> float | None:
    """What the noise in the graph promises for one sample's inputs over ``epochs`` uses, at delta 1e-5."""
    from splitsec.privacy.accounting import epsilon
    from splitsec.privacy.release import Gaussian

    graph = yaml.safe_load((folder / "graph.yaml").read_text())
    forward = graph["cuts"][0].get("privacy", {}).get("forward")
    if forward is None:
        return None
    return epsilon({Gaussian(forward["noise_multiplier"], math.prod(graph["cuts"][0]["shape"])): epochs}, 1e-5)


def table(data: str, attack: str, rows: Mapping[str, Any]) -> list[str]:
    """One attack against every defence."""
    found = [row for row in rows.values() if attack in row]
    baseline = next((row[attack]["baseline_mse"] for row in found if row[attack]["baseline_mse"] is not None), None)
    figures = sorted({name for row in found for name in row[attack]["figures"]})
    lines = [f"## {attack} on {data}", ""]
    if baseline is not None:
        lines += [f"Error of the mean sample: {baseline:.3f}.", ""]
    heads = ["defence", "accuracy", *(["error"] if baseline is not None else []), *figures, "stopped at", "verdict"]
    lines += ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in found:
        one = row[attack]
        what = row["what"]
        if (epsilon := row.get("epsilon")) is not None:
            what += f" (epsilon {epsilon:.3g})" if math.isfinite(epsilon) else " (no finite epsilon)"
        cells = [what, f"{row['accuracy']:.1%}"]
        if baseline is not None:
            cells.append(number(one["reconstruction_mse"]))
        cells += [number(one["figures"].get(name)) for name in figures]
        cells += ["-" if one["stopped_at_batch"] is None else str(one["stopped_at_batch"]), one["verdict"]]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def number(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
