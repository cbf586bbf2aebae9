"""Two samples through every module tell whether the graph's shapes and dtypes are true, with the line of the one that
is not.

Real folders with real modules.  What the command line makes of these errors is in ``tests/transcripts``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from splitsec.errors import GraphError, PartyFileError, SamplesError, UnsafeSegment
from splitsec.partyfile import load_folder
from splitsec.probe import probe
from tests.conftest import change, write_folder

CUT, LABELS = 13, 15
"""Lines of the small folder's graph file."""


def checked(folder: Path) -> None:
    probe(load_folder(folder))


def model(folder: Path, stem: str) -> None:
    """Replace the clinics' module."""
    change(folder / "parties" / "models.py", ("    return Watched(6, 8, **args)", f"    return {stem}"))


def test_a_folder_that_is_right(folder: Path) -> None:
    checked(folder)


@pytest.mark.parametrize(
    ("shape", "dtype", "seen"),
    [
        ("[9]", "float32", "declares shape [9], float32"),
        ("[8, 1]", "float32", "declares shape [8, 1], float32"),
        ("[]", "float32", "declares shape [], float32"),
        ("[8]", "float64", "declares shape [8], float64"),
    ],
)
def test_a_cut_that_is_not_what_its_source_makes(folder: Path, shape: str, dtype: str, seen: str) -> None:
    change(folder / "graph.yaml", ("shape: [8], dtype: float32", f"shape: {shape}, dtype: {dtype}"))
    with pytest.raises(GraphError) as error:
        checked(folder)
    assert error.value.line == CUT
    assert error.value.file == str(folder / "graph.yaml")
    assert error.value.seen == f"the cut stem -> trunk {seen}"
    assert (
        "'stem' at 'clinic-a' really makes of 2 samples: shape [2, 8] with the batch, float32" in error.value.expected
    )
    assert error.value.fix == "write `shape: [8], dtype: float32` there, or change the module"


def test_a_cut_that_its_target_cannot_take(folder: Path) -> None:
    """The clinics' side is right; the server's module, which only the server has, wants 8 numbers and not 7."""
    change(folder / "graph.yaml", ("shape: [8]", "shape: [7]"))
    model(folder, "nn.Linear(6, 7)")
    with pytest.raises(GraphError) as error:
        checked(folder)
    assert error.value.line == CUT
    assert "segment 'trunk', given [2, 7] float32" in error.value.seen
    assert str(folder / "parties" / "models.py") in error.value.seen
    assert "RuntimeError" in error.value.seen


def test_a_module_that_loses_the_batch(folder: Path) -> None:
    """One row less than it was given, though the rest fits."""
    model(folder, "nn.Sequential(nn.Linear(6, 8), Fewer())")
    with (folder / "parties" / "models.py").open("a") as file:
        file.write("\n\nclass Fewer(nn.Module):\n    def forward(self, x):\n        return x[1:]\n")
    with pytest.raises(GraphError, match="the cut stem -> trunk") as error:
        checked(folder)
    assert "shape [1, 8] with the batch" in error.value.expected


def test_labels_that_are_not_what_the_data_hold(folder: Path) -> None:
    change(folder / "graph.yaml", ("{from: clinics, to: trunk}\n", "{from: clinics, to: trunk, shape: [2]}\n"))
    with pytest.raises(GraphError) as error:
        checked(folder)
    assert error.value.line == LABELS
    assert error.value.seen == "the labels for 'trunk' declare shape [2], int64"
    assert error.value.expected == "what field 'y' of 'clinic-a' really holds: shape [], int64"


def test_a_loss_that_does_not_fit_the_output(folder: Path) -> None:
    """Three scores for each sample, and one target."""
    change(
        folder / "graph.yaml",
        ("loss: cross_entropy", "loss: bce_with_logits"),
        ("to: trunk}\n", "to: trunk, dtype: float32}\n"),
    )
    change(folder / "parties" / "data.py", ("x[:, :3].argmax(1)", "x[:, :3].argmax(1).float()"))
    with pytest.raises(GraphError) as error:
        checked(folder)
    assert error.value.line == LABELS
    assert "the loss of segment 'trunk', given [2, 3] and labels [2], failed: ValueError" in error.value.seen


def test_a_module_that_fails_at_its_source(folder: Path) -> None:
    """There is no cut to blame: file and line are the user's own."""
    model(folder, "nn.Linear(5, 8)")
    with pytest.raises(PartyFileError, match=r"segment 'stem', given \[2, 6\] float32 .* failed: RuntimeError"):
        checked(folder)


def test_a_module_that_cannot_be_built(folder: Path) -> None:
    model(folder, "Watched(6, 8, 9, 10, 11)")
    with pytest.raises(PartyFileError, match="TypeError") as error:
        checked(folder)
    assert error.value.file == str(folder / "parties" / "models.py")
    assert error.value.line is not None
    assert (folder / "parties" / "models.py").read_text().splitlines()[
        error.value.line - 1
    ] == "    return Watched(6, 8, 9, 10, 11)"


def test_something_that_is_no_tensor(folder: Path) -> None:
    model(folder, "Pair()")
    with (folder / "parties" / "models.py").open("a") as file:
        file.write(
            "\n\nclass Pair(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.inner = nn.Linear(6, 8)\n\n    def forward(self, x):\n        return self.inner(x), x\n"
        )
    with pytest.raises(PartyFileError, match="stem"):
        checked(folder)


def test_a_field_that_is_missing(folder: Path) -> None:
    change(folder / "graph.yaml", ("data: x}", "data: pixels}"))
    with pytest.raises(SamplesError, match="`data:train` returned no field 'pixels'; it has 'x', 'y'"):
        checked(folder)


def test_every_party_is_looked_at(folder: Path) -> None:
    """The second clinic's module differs from the first one's."""
    models = folder / "parties" / "models.py"
    change(
        models, ("    return Watched(6, 8, **args)", "    return nn.Linear(6, 8 if args['party'] == 'clinic-a' else 4)")
    )
    with pytest.raises(GraphError, match="the cut stem -> trunk") as error:
        checked(folder)
    assert "'stem' at 'clinic-b' really makes of 2 samples: shape [2, 4]" in error.value.expected


def test_one_sample_is_enough(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one")
    change(folder / "parties" / "data.py", ("samples(site, 24)", "samples(site, 1)"))
    checked(folder)


def test_modules_are_looked_at_in_evaluation_mode(folder: Path) -> None:
    """Batch norm over one sample fails in training mode, and would count the sample."""
    model(folder, "nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))")
    change(folder / "parties" / "data.py", ("samples(site, 24)", "samples(site, 1)"))
    checked(folder)


def test_labels_above_the_number_of_outputs(folder: Path) -> None:
    """Two scores for each sample, and three classes: the first batch with the third class would fail."""
    change(folder / "parties" / "data.py", ("x[:, :3].argmax(1)", "x[:, :3].argmax(1) + 1"))
    with pytest.raises(GraphError, match="go up to 3, but it has 3 outputs") as error:
        checked(folder)
    assert error.value.expected == "one output for each class: at least 4"


def test_labels_of_a_dtype_that_the_loss_does_not_take(folder: Path) -> None:
    change(folder / "parties" / "data.py", ("x[:, :3].argmax(1)", "x[:, :3].argmax(1).int()"))
    with pytest.raises(PartyFileError, match="field 'y', which labels 'trunk', is int32") as error:
        checked(folder)
    assert error.value.fix == "return it as int64 from the data function"


def test_what_user_code_prints_is_not_on_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (folder / "parties" / "models.py").open("a") as file:
        file.write("\n\nprint('from Python')\nos.write(1, b'from below\\n')\n")
    checked(folder)
    seen = capfd.readouterr()
    assert seen.out == ""
    assert "from Python" in seen.err and "from below" in seen.err


@pytest.mark.parametrize(
    ("stem", "right"),
    [
        ("torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU())", True),
        ("torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Sigmoid())", False),
    ],
)
def test_a_cut_that_leaves_out_zeros_behind_something_else_than_a_relu(folder: Path, stem: str, right: bool) -> None:
    """Also where nothing is negative."""
    model(folder, stem)
    graph = folder / "graph.yaml"
    graph.write_text(
        graph.read_text().replace("shape: [8], dtype: float32", "shape: [8], dtype: float32, codec: nonzero")
    )
    assert "nonzero" in graph.read_text()
    if right:
        checked(folder)
    else:
        with pytest.raises(UnsafeSegment, match="is not the output of a ReLU: it was made by Sigmoid"):
            checked(folder)
