"""``splitsec bench nopeek``: what NoPeek costs in accuracy, and what an attacker who trains a decoder loses by it.

Here: the network and the data of a folder like examples/vanilla, trained once for each alpha and seed; an attacker for
each of these trainings; pictures.  Not here: NoPeek itself (``splitsec.privacy.leakage``), nor how a party applies it.

Both segments train in one plain process: the same computation as a graph in which one clinic holds all the images,
which equals it to the last bit (examples/compare.py), and several times as quick.  Every training is a process of its
own with one thread, so that as many run at once as the machine has cores, and seeds decide all that is random.

The attacker is the server, or whoever reads what it receives: it has the activations of the test images.  It also has
images of the same kind, the folder's public ones, and their activations *under the very stem that it attacks* (it ran
that stem, or had such images sent through it).  With these pairs it trains decoders, a new one for every alpha: four
fifths of the pairs to learn from, the rest to stop at the best pass over them.  The better of two kinds of decoder
counts, by those same pairs; its error is then taken on all test images, none of which it has seen.

``--bottleneck`` moves the cut behind one more layer, of fewer numbers: a case where distance correlation falls much
further than the decoder's error rises.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from splitsec.errors import InternalError, UserError
from splitsec.partyfile import load_function
from splitsec.process import die_with_parent, prepare

__all__ = ["Report", "Run", "Summary", "add_arguments", "bench_nopeek", "main", "run"]

ALPHAS: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
SEEDS: Final = (1, 2)
EPOCHS: Final = 20
BATCH: Final = 50
LEARNING_RATE: Final = 0.001

DECODERS: Final[Mapping[str, int]] = {"convolutional": 30, "dense": 15}
"""Kinds of decoder, and how many times each goes over its pairs."""

DECODER_RATE: Final[Mapping[str, float]] = {"convolutional": 0.002, "dense": 0.001}
DECODER_BATCH: Final = 25

QUICK_ALPHAS: Final = (0.0, 1.0, 4.0)
QUICK_EPOCHS: Final = 6
QUICK_PASSES: Final = 6

AT_MOST: Final = 0.02
"""How much accuracy NoPeek may cost."""

AT_LEAST: Final = 2.0
"""How many times as large the decoder's error must be then."""

ONE: Final = "--one"
"""What the process of one training is started with."""


@dataclass(frozen=True)
class Run:
    """One training and the attack on it.  Errors are mean squared errors of a pixel in 0..1, on the test images."""

    alpha: float
    seed: int
    accuracy: float
    loss: float
    """Cross-entropy on the test images, without NoPeek's term."""
    decoder_mse: float
    """Of the decoder that did better on the attacker's own pairs."""
    decoder_mses: dict[str, float]
    distance_correlation: float
    """Plain, between all test images and their activations."""
    distance_correlation_corrected: float
    seconds: float
    pictures: str = field(repr=False)
    """Reconstructions of the first test image of each digit: bytes in base64."""


@dataclass(frozen=True)
class Summary:
    """Medians over seeds for one alpha; ``cost`` and ``gain`` against alpha 0, medians of the seeds' own ones."""

    alpha: float
    accuracy: float
    loss: float
    decoder_mse: float
    distance_correlation: float
    distance_correlation_corrected: float
    cost: float
    """Accuracy lost, 0.01 for a point."""
    gain: float
    """How many times as large the decoder's error is."""


@dataclass(frozen=True)
class Report:
    """All runs; ``mean_mse`` and ``class_mean_mse`` are what one has without any activation: see ``_references``."""

    quick: bool
    minimised: str
    bottleneck: int | None
    seeds: tuple[int, ...]
    epochs: int
    mean_mse: float
    class_mean_mse: float
    seconds: float
    runs: tuple[Run, ...]

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """One for each alpha, in order."""
        plain = {run.seed: run for run in self.runs if run.alpha == 0}
        found = []
        for alpha in sorted({run.alpha for run in self.runs}):
            runs = [run for run in self.runs if run.alpha == alpha]
            medians = {
                name: statistics.median(getattr(run, name) for run in runs)
                for name in Summary.__dataclass_fields__
                if name in Run.__dataclass_fields__
            }
            found.append(
                Summary(
                    **medians,
                    cost=statistics.median(plain[run.seed].accuracy - run.accuracy for run in runs),
                    gain=statistics.median(run.decoder_mse / plain[run.seed].decoder_mse for run in runs),
                )
            )
        return tuple(found)

    @property
    def chosen(self) -> Summary | None:
        """The alpha that hides most at a cost of at most ``AT_MOST``; None where every one costs more."""
        cheap = [one for one in self.summaries if one.alpha > 0 and one.cost <= AT_MOST]
        return max(cheap, key=lambda one: one.decoder_mse, default=None)

    @property
    def verdicts(self) -> dict[str, bool | None]:
        """What was asked for, and whether it is so; None where --quick trained too little to tell."""
        wanted = f"decoder's error at least {AT_LEAST:g} times as large at a loss of at most {100 * AT_MOST:g} points"
        return {wanted: None if self.quick else self.chosen is not None and self.chosen.gain >= AT_LEAST}

    def as_json(self) -> dict[str, Any]:
        """Plain values, without pictures."""
        runs = [{name: value for name, value in asdict(run).items() if name != "pictures"} for run in self.runs]
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "runs"},
            "seeds": list(self.seeds),
            "summaries": [asdict(one) for one in self.summaries],
            "chosen_alpha": self.chosen.alpha if self.chosen else None,
            "verdicts": self.verdicts,
            "runs": runs,
        }


# --- the measurement --------------------------------------------------------------------------------------------------


def bench_nopeek(
    folder: Path,
    *,
    alphas: Sequence[float] = ALPHAS,
    seeds: Sequence[int] = SEEDS,
    minimise: str = "corrected",
    bottleneck: int | None = None,
    quick: bool = False,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    """Train and attack for each of ``alphas`` (0 is added) and ``seeds``; ``folder`` as examples/vanilla.

    ``minimise``: which distance correlation, "corrected" or "plain".  ``bottleneck``: cut after a further layer of so
    many numbers.  ``workers``: processes at once (default: as many as cores).  Raises ``UserError`` and its kind where
    the folder does not have what is needed.
    """
    began = time.monotonic()
    place = folder / "parties"
    if not (place / "data.py").is_file():
        raise UserError(
            f"no data.py in {place}",
            expected="a folder like examples/vanilla of splitsec's repository",
            fix="run this in the repository, or name such a folder with --folder",
        )
    mean_mse, class_mean_mse = _references(place)
    jobs: list[dict[str, Any]] = [
        {
            "place": str(place.resolve()),
            "alpha": alpha,
            "seed": seed,
            "minimise": minimise,
            "bottleneck": bottleneck,
            "epochs": QUICK_EPOCHS if quick else EPOCHS,
            "passes": QUICK_PASSES if quick else None,
        }
        for seed in seeds
        for alpha in sorted({0.0, *alphas})
    ]
    runs: list[Run] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:  # each of its threads waits for a process
        for run in pool.map(_in_a_process, jobs):
            runs.append(run)
            tell(f"{len(runs)} of {len(jobs)}: {_line(run)}")
    return Report(
        quick=quick,
        minimised=minimise,
        bottleneck=bottleneck,
        seeds=tuple(seeds),
        epochs=jobs[0]["epochs"],
        mean_mse=mean_mse,
        class_mean_mse=class_mean_mse,
        seconds=round(time.monotonic() - began, 1),
        runs=tuple(sorted(runs, key=lambda run: (run.alpha, run.seed))),
    )


def _line(run: Run) -> str:
    return (
        f"alpha {run.alpha:g}, seed {run.seed}: accuracy {100 * run.accuracy:.2f} %, decoder's error "
        f"{run.decoder_mse:.4f}, distance correlation {run.distance_correlation:.2f}, corrected "
        f"{run.distance_correlation_corrected:.3f} ({run.seconds:.0f} s)"
    )


def _in_a_process(job: Mapping[str, Any]) -> Run:
    ended = subprocess.run(
        [sys.executable, "-m", "splitsec.bench.nopeek", ONE],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"),
    )
    if ended.returncode:
        raise InternalError(f"the training with alpha {job['alpha']:g} ended with {ended.returncode}")
    return Run(**json.loads(ended.stdout))


def _references(place: Path) -> tuple[float, float]:
    """The error on the test images of the mean public image, and of the mean public image of the right digit.

    The first is what a decoder gets from an activation that says nothing, the second from one that says the label and
    no more, as it must say for the task.
    """
    _, test, public = _parts(place)
    means = {int(digit): public["x"][public["y"] == digit].mean(0) for digit in public["y"].unique()}
    guesses = [means[int(digit)] for digit in test["y"]]
    by_class = statistics.fmean(
        float((image - guess).square().mean()) for image, guess in zip(test["x"], guesses, strict=True)
    )
    return float((test["x"] - public["x"].mean(0)).square().mean()), by_class


def _parts(place: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """All clinics' images for training, all for testing, the public ones: ``x`` ``[n, 1, 28, 28]``, ``y`` ``[n]``."""
    import torch

    clinics = len(list(place.glob("clinic-*.yaml")))

    def gathered(name: str) -> dict[str, Any]:
        shares = [load_function(f"data:{name}", place)(site=site) for site in range(clinics)]
        return {key: torch.cat([share[key] for share in shares]) for key in ("x", "y")}

    return gathered("train"), gathered("test"), load_function("data:public", place)()


# --- one training and the attack on it: in a process of its own -------------------------------------------------------


def _train_and_attack(job: Mapping[str, Any]) -> Run:
    import torch
    from torch.nn.functional import cross_entropy

    from splitsec.privacy.leakage import measure

    began = time.monotonic()
    place = Path(job["place"])
    train, test, public = _parts(place)
    stem, trunk = _trained(place, train, job)
    with torch.no_grad():
        seen, known = stem(test["x"]), stem(public["x"])
        scores = trunk(seen)
    attacks = {
        kind: _decode(kind, known, public["x"], seen, seed=job["seed"], passes=job["passes"] or passes)
        for kind, passes in DECODERS.items()
        if kind == "dense" or known.dim() == 4
    }
    errors = {kind: float((images - test["x"]).square().mean()) for kind, (_, images) in attacks.items()}
    best = min(attacks, key=lambda kind: attacks[kind][0])
    first = [int((test["y"] == digit).nonzero()[0]) for digit in test["y"].unique()]
    measured = measure(test["x"], seen)
    return Run(
        alpha=job["alpha"],
        seed=job["seed"],
        accuracy=float((scores.argmax(1) == test["y"]).double().mean()),
        loss=float(cross_entropy(scores, test["y"])),
        decoder_mse=errors[best],
        decoder_mses=errors,
        distance_correlation=measured["distance_correlation"],
        distance_correlation_corrected=measured["distance_correlation_corrected"],
        seconds=round(time.monotonic() - began, 1),
        pictures=_packed(attacks[best][1][first]),
    )


def _trained(place: Path, train: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[Any, Any]:
    import torch
    from torch.nn.functional import cross_entropy

    from splitsec.privacy.leakage import distance_correlation, nopeek_term

    term = nopeek_term if job["minimise"] == "corrected" else distance_correlation
    torch.manual_seed(job["seed"])
    stem, trunk = load_function("models:stem", place)(), load_function("models:trunk", place)()
    if job["bottleneck"]:
        stem, trunk = _narrowed(stem, train["x"][:1], job["bottleneck"])
    optimizer = torch.optim.Adam([*stem.parameters(), *trunk.parameters()], lr=LEARNING_RATE)
    for _ in range(job["epochs"]):
        for chosen in torch.split(torch.randperm(len(train["x"])), BATCH):
            activation = stem(train["x"][chosen])
            loss: Any = cross_entropy(trunk(activation), train["y"][chosen])
            if job["alpha"]:
                loss = loss + job["alpha"] * term(train["x"][chosen], activation)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return stem.eval(), trunk.eval()


def _narrowed(stem: Any, x: Any, width: int) -> tuple[Any, Any]:
    """A stem that ends in ``width`` numbers, and a trunk that begins there.  Leaky, or NoPeek would switch it off."""
    import torch
    from torch import nn

    with torch.no_grad():
        wide = stem(x).numel()
    longer = nn.Sequential(stem, nn.Flatten(), nn.Linear(wide, width), nn.LeakyReLU(0.1))
    last = nn.Sequential(nn.Dropout(0.3), nn.Linear(width, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))
    return longer, last


def _decode(kind: str, known: Any, images: Any, seen: Any, *, seed: int, passes: int) -> tuple[float, Any]:
    """Train a decoder on pairs (``known``, ``images``); its error on the pairs it stops by, and ``seen`` decoded."""
    import torch
    from torch.nn.functional import mse_loss

    apart = (0, 2, 3) if kind == "convolutional" else (0,)  # no defence by scale: what goes in is standardised
    mean, spread = known.mean(apart, keepdim=True), known.std(apart, keepdim=True) + 1e-3 * known.std() + 1e-12
    known, seen = (known - mean) / spread, (seen - mean) / spread

    torch.manual_seed(seed)
    decoder = _decoder(kind, tuple(known.shape[1:]), tuple(images.shape[1:]))
    optimizer = torch.optim.Adam(decoder.parameters(), lr=DECODER_RATE[kind])
    learning = 4 * len(known) // 5
    best: tuple[float, Any] = (float("inf"), None)
    for _ in range(passes):
        for chosen in torch.split(torch.randperm(learning), DECODER_BATCH):
            optimizer.zero_grad()
            loss: Any = mse_loss(decoder(known[chosen]), images[chosen])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = float(mse_loss(decoder(known[learning:]), images[learning:]))
            if error < best[0]:
                best = (error, decoder(seen))
    return best


def _decoder(kind: str, cut: tuple[int, ...], image: tuple[int, ...]) -> Any:
    """From ``[n, *cut]`` to ``[n, *image]`` in 0..1; the convolutional kind doubles height and width twice."""
    from torch import nn

    if kind == "convolutional":
        layers: list[Any] = [
            nn.ConvTranspose2d(cut[0], 24, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(24, 12, kernel_size=4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, image[0], kernel_size=3, padding=1),
        ]
    else:
        layers = [nn.Flatten(), nn.Linear(math.prod(cut), 512), nn.ReLU(), nn.Linear(512, math.prod(image))]
        layers.append(nn.Unflatten(1, image))
    return nn.Sequential(*layers, nn.Sigmoid())


def _packed(images: Any) -> str:
    return base64.b64encode((images * 255).round().byte().numpy().tobytes()).decode()


# --- pictures ---------------------------------------------------------------------------------------------------------

_BLUE: Final = "#0072b2"  # both from the colour-blind safe set of Okabe and Ito
_ORANGE: Final = "#d55e00"


def _figure(width: float, height: float) -> Any:
    """An empty matplotlib figure."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise UserError(
            "the pictures need matplotlib, which is not installed", fix="pip install 'splitsec[examples]'"
        ) from error
    matplotlib.rcParams["font.size"] = 9
    return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def draw(report: Report, folder: Path, images: Path) -> list[Path]:
    """Write nopeek-curve.png and nopeek-images.png to ``images``; ``folder`` is where the originals are."""
    images.mkdir(parents=True, exist_ok=True)
    curve, faces = images / "nopeek-curve.png", images / "nopeek-images.png"
    _curve(report).savefig(curve, dpi=110, bbox_inches="tight")
    _faces(report, folder).savefig(faces, dpi=110, bbox_inches="tight")
    return [curve, faces]


def _curve(report: Report) -> Any:
    figure = _figure(7.2, 3.2)
    left, right = figure.subplots(1, 2)
    places = {one.alpha: place for place, one in enumerate(report.summaries)}  # evenly: 0 has no place on a log scale
    panels: tuple[tuple[Any, str, str, Callable[[Any], float]], ...] = (
        (left, "accuracy on test images, %", _BLUE, lambda run: 100 * run.accuracy),
        (right, "decoder's mean squared error", _ORANGE, lambda run: run.decoder_mse),
    )
    for axes, title, colour, value in panels:
        axes.plot(list(places.values()), [value(one) for one in report.summaries], color=colour, linewidth=2)
        axes.plot(
            [places[run.alpha] for run in report.runs], [value(run) for run in report.runs], "o", color=colour, ms=4
        )
        axes.set_xticks(list(places.values()), [f"{alpha:g}" for alpha in places])
        axes.set_xlabel("alpha")
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    least = 100 * (report.summaries[0].accuracy - AT_MOST)
    _threshold(left, least, f"{100 * AT_MOST:g} points lost")
    right.set_ylim(0, 1.1 * report.mean_mse)
    _threshold(right, report.mean_mse, "mean image: no activation")
    _threshold(right, report.class_mean_mse, "mean image of the digit")
    _threshold(right, AT_LEAST * report.summaries[0].decoder_mse, f"{AT_LEAST:g} times alpha 0")
    return figure


def _threshold(axes: Any, height: float, text: str) -> None:
    axes.axhline(height, color="#666666", linewidth=1, linestyle="--")
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (0.01, height), (0, 2), color="#444444", **place)


def _faces(report: Report, folder: Path) -> Any:
    """The first test image of each digit, and what the first seed's decoder makes of it for each alpha."""
    import numpy as np

    _, test, _ = _parts(folder / "parties")
    digits = test["y"].unique()
    originals = np.stack([test["x"][test["y"] == digit][0, 0].numpy() for digit in digits])
    rows = [("original", originals)]
    for run in report.runs:
        if run.seed == report.seeds[0]:
            pixels = np.frombuffer(base64.b64decode(run.pictures), dtype=np.uint8) / 255
            rows.append((f"alpha {run.alpha:g}", pixels.reshape(originals.shape)))
    height, width = originals.shape[1:]
    sheet = np.zeros((len(rows) * height, len(digits) * width))
    for down, (_, pictures) in enumerate(rows):
        for along, picture in enumerate(pictures):
            sheet[down * height : (down + 1) * height, along * width : (along + 1) * width] = picture
    figure = _figure(7.2, 0.66 * len(rows))
    axes = figure.subplots()
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([(down + 0.5) * height for down in range(len(rows))], [name for name, _ in rows])
    axes.tick_params(length=0)
    return figure


# --- the command ------------------------------------------------------------------------------------------------------

DESCRIPTION: Final = """\
Train examples/vanilla's network with and without NoPeek and let an attacker train decoders on what leaves the clinic.
Says what each alpha costs in accuracy and how much worse the decoders do.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``splitsec bench nopeek``."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else, on standard output")
    parser.add_argument("--quick", action="store_true", help="one seed, three alphas, little training: rough figures")
    parser.add_argument("--alphas", type=_alphas, metavar="LIST", help="with commas between (default: 0,0.5,1,2,4,8)")
    parser.add_argument("--seeds", type=_seeds, metavar="LIST", help="with commas between (default: 1,2)")
    parser.add_argument(
        "--minimise",
        choices=("corrected", "plain"),
        default="corrected",
        help="which distance correlation NoPeek minimises; plain: as published, biased (default: %(default)s)",
    )
    parser.add_argument(
        "--bottleneck", type=_counted, metavar="N", help="cut after a further layer of N numbers, not the example's cut"
    )
    parser.add_argument("--workers", type=_counted, metavar="N", help="trainings at once (default: as many as cores)")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="write nopeek-curve.png and nopeek-images.png there"
    )
    parser.add_argument(
        "--folder", type=Path, default=_example(), metavar="FOLDER", help="network and data (default: examples/vanilla)"
    )


def _example() -> Path:
    """examples/vanilla: here, or beside the package in the repository."""
    here = Path("examples/vanilla")
    return here if here.is_dir() else Path(__file__).resolve().parents[2] / here


def _alphas(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= alpha < 1e6 for alpha in found):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers from 0 to a million, with commas between")
    return found


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_counted(part) for part in text.split(",")))


def _counted(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 1000000")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0 where NoPeek does what was asked of it, or where --quick asked for too little to tell."""
    if arguments.pictures is not None:
        _figure(1, 1)  # say now that matplotlib is missing
    quick = arguments.quick
    report = bench_nopeek(
        arguments.folder,
        alphas=arguments.alphas or (QUICK_ALPHAS if quick else ALPHAS),
        seeds=arguments.seeds or (SEEDS[:1] if quick else SEEDS),
        minimise=arguments.minimise,
        bottleneck=arguments.bottleneck,
        quick=quick,
        workers=arguments.workers,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.pictures is not None:
        for path in draw(report, arguments.folder, arguments.pictures):
            print(f"wrote {path}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print("\n".join(_lines(report)))
    return 0 if all(met is not False for met in report.verdicts.values()) else 1


def _lines(report: Report) -> Iterator[str]:
    cut = f"the cut is {report.bottleneck} numbers" if report.bottleneck else "the example's cut"
    yield f"minimised: {report.minimised} distance correlation; {cut}; medians of {len(report.seeds)} seed(s)"
    columns = ("alpha", "accuracy", "cost", "loss", "decoder's error", "times", "dist. corr.", "corrected")
    yield _row(columns)
    for one in report.summaries:
        yield _row(
            (
                f"{one.alpha:g}",
                f"{100 * one.accuracy:.2f} %",
                f"{100 * one.cost:+.2f}",
                f"{one.loss:.3f}",
                f"{one.decoder_mse:.4f}",
                f"{one.gain:.2f}",
                f"{one.distance_correlation:.3f}",
                f"{one.distance_correlation_corrected:.3f}",
            )
        )
    yield f"without any activation: {report.mean_mse:.4f} (mean image), {report.class_mean_mse:.4f} (of its digit)"
    for text, met in report.verdicts.items():
        yield f"{ {True: 'yes', False: 'NO', None: '-'}[met]:4}{text}"
    yield f"{report.seconds:.0f} s"


def _row(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>16}" for cell in cells)


def main() -> int:
    """``python -m splitsec.bench.nopeek``: the measurement, or, for its own use, the process of one training."""
    if sys.argv[1:] == [ONE]:
        die_with_parent()
        prepare(1)
        print(json.dumps(asdict(_train_and_attack(json.load(sys.stdin)))))
        return 0
    parser = argparse.ArgumentParser(prog="splitsec bench nopeek", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
