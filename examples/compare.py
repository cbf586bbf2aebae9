"""Compare what several parties trained together with the same network trained in one process.

    splitsec simulate examples/vanilla --out out/vanilla
    python examples/compare.py examples/vanilla out/vanilla

Trains ``one_process.py`` of the example, which imports nothing of splitsec, prints the accuracy of both, and compares
every trained tensor bit by bit.  Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor


def main() -> int:
    """Read the command line, train, print; the exit status."""
    parser = argparse.ArgumentParser(description="Compare a simulation's result with one process in plain PyTorch.")
    parser.add_argument("example", type=Path, help="folder of the example")
    parser.add_argument("out", type=Path, help="what `splitsec simulate EXAMPLE --out OUT` wrote")
    parser.add_argument("--epochs", type=int, help="if the simulation was given another number than the graph file's")
    parser.add_argument("--seed", type=int, help="likewise")
    given = parser.parse_args()

    one_process = load(given.example / "one_process.py")
    trained = {file.relative_to(given.out): load_file(file) for file in sorted(given.out.glob("*/*.safetensors"))}
    if not trained:
        parser.error(
            f"no trained segments in {given.out}: run `splitsec simulate {given.example} --out {given.out}` first"
        )
    torch.set_num_threads(1)
    chosen = {"epochs": given.epochs, "seed": given.seed}
    expected = one_process.train(**{name: value for name, value in chosen.items() if value is not None})

    split: dict[str, dict[str, Tensor]] = {}
    unequal = []
    for file, weights in trained.items():
        party, segment = file.parts[0], file.stem
        place = (
            f"{party}/{segment}" if f"{party}/{segment}" in expected else segment
        )  # a segment that each member keeps
        split[place] = weights
        unequal += [
            f"{party}/{segment}: {name}"
            for name in expected[place]
            if not torch.equal(weights[name], expected[place][name])
        ]

    of_one, of_split = one_process.accuracy(expected), one_process.accuracy(split)
    parties = len({file.parts[0] for file in trained})
    print(f"{'test accuracy of':34}" + "".join(f"{segment:>12}" for segment in of_one))
    print(f"{f'{parties} parties, a process each':34}" + "".join(f"{share:12.2%}" for share in of_split.values()))
    print(f"{'one process, plain PyTorch':34}" + "".join(f"{share:12.2%}" for share in of_one.values()))
    tensors = sum(len(weights) for weights in trained.values())
    if unequal:
        print(f"{len(unequal)} of {tensors} trained tensors differ:", *unequal, sep="\n  ")
        return 1
    print(f"all {tensors} trained tensors are equal to the last bit")
    return 0


def load(file: Path) -> ModuleType:
    """The example's ``one_process.py`` as a module."""
    spec = importlib.util.spec_from_file_location("one_process", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    raise SystemExit(main())
