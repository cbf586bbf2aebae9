"""``splitsec plan``: what it prints and how it fails, run in this process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from splitsec.cli import plan
from splitsec.errors import UserError
from tests.splitsec.test_measuring import make

PUBLISHED = (
    *("--model", "vgg16", "--input", "3x32x32", "--classes", "1000", "--cut", "conv1"),
    *("--clients", "100", "--epochs", "58.3", "--samples", "50000"),
)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    return plan.run(parser.parse_args(["plan", *arguments]))


def test_the_published_network_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*PUBLISHED, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    split, federated, sgd = said["methods"]
    assert split["published"] / 1e12 == pytest.approx(0.1548, rel=0.005)
    assert federated["published"] / 1e12 == pytest.approx(29.40, rel=0.005)
    assert sgd["published"] == federated["published"]
    assert (federated["parameters"], said["fewer_from"]) == (37_694_248, 87)
    assert [one["after"] for one in said["candidates"] if one["chosen"]] == ["conv1"]
    assert said["setting"]["schedule"] == "round_robin"
    assert said["line"] == {"bytes_per_second": 125e6, "delay_seconds": 0.0005}
    assert said["schedule"]["tried"][0]["schedule"] == "lock-step"


def test_the_published_network_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*PUBLISHED, "--count", "published") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "vgg16 on 3x32x32, 1,000 classes: 100 clients, 50,000 training samples in all, batches of 64, "
    )
    rows = {row.split("│")[1].strip(): row for row in out.splitlines() if row.startswith("│")}
    assert "154.7 GFLOP" in rows["split learning"]
    assert "29.4 TFLOP" in rows["federated learning"]
    assert "from 87" in rows["* conv1"]
    assert "Split learning sends fewer bytes than federated learning from 87 clients on" in out
    assert "schedule, over 1gbit with 0.5ms each way: " in out


def test_the_published_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--published") == 0
    out = capsys.readouterr().out
    assert "0.1548 TFLOP │  0.1547 TFLOP │ -0.04%" in out
    assert "follow from none" in out
    assert run("--published", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    for row in said["computed"]:
        if row["printed_tflop"] != 0.03:  # printed with one digit
            assert abs(row["off"]) < 0.005
    needed = {(row["method"], row["clients"]): row["needed"] for row in said["sent"]}
    assert needed["split learning", 100] == pytest.approx(needed["split learning", 500])
    assert needed["federated learning", 100] != pytest.approx(needed["federated learning", 500], rel=0.1)


def test_without_a_cut_all_places_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "resnet18", "--input", "3x32x32", "--classes", "10") == 0
    out = capsys.readouterr().out
    assert "   layer2.0 " in out
    assert out.endswith(
        "Choose one with --cut LAYER; then --bandwidth, --delay and --gflops say which schedule is best.\n"
    )


def test_batch_norm_keeps_batches_whole(capsys: pytest.CaptureFixture[str]) -> None:
    line = ("--bandwidth", "100mbit", "--delay", "25ms")
    assert run("--model", "resnet18", "--input", "3x32x32", "--cut", "layer1", *line) == 0
    out = capsys.readouterr().out
    assert "schedule, over 100mbit with 25ms each way: whole batches, early cut gradient" in out
    assert "resnet18 has BatchNorm2d, which looks at a whole batch, so micro-batches are refused there." in out


def test_a_codec_makes_cuts_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    crossing = {}
    for codec in (None, "bfloat16", "int8"):
        assert run(*PUBLISHED, *(["--codec", codec] if codec else []), "--json") == 0
        said = json.loads(capsys.readouterr().out)
        crossing[codec] = said["flows"][0]["epoch"]
    assert crossing[None] == 2 * crossing["bfloat16"] == 500 * 4 * 64 * 32 * 32
    assert crossing["int8"] == pytest.approx(crossing["bfloat16"] / 2, rel=0.001)


def test_the_line_decides(capsys: pytest.CaptureFixture[str]) -> None:
    """On a slow line a step takes its two ways and a round trip more."""
    seconds = []
    for line in ("--bandwidth 10gbit --delay 0ms", "--bandwidth 100mbit --delay 25ms"):
        assert run(*PUBLISHED, *line.split(), "--json") == 0
        seconds.append(json.loads(capsys.readouterr().out)["schedule"]["tried"][0]["seconds"])
    size = 64 * 4 * 64 * 32 * 32
    assert seconds[1] - seconds[0] == pytest.approx(2 * size / 12.5e6 - 2 * size / 1.25e9 + 0.05)


def test_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """User code that prints does not spoil the document."""
    folder = make(tmp_path / "small", ("import torch\n", "import torch\nprint('loaded')\n"))
    assert run(str(folder), "--json", "--gflops", "1", "--epochs", "2.5") == 0
    out, err = capfd.readouterr()
    said = json.loads(out)
    assert "loaded" in err
    assert [one["party"] for one in said["parties"]] == ["ann", "ben", "server"]
    assert said["setting"]["epochs"] == 2.5
    flops = 4 * (2 * 12 + 3 * 50)  # of a step of 4 samples, on both sides
    line = 2 * 4 * 12 / 125e6 + 2 * 0.0005
    assert said["schedule"]["tried"][0]["seconds"] == pytest.approx(flops / 1e9 + line)


def test_a_folder_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(make(tmp_path / "small"))) == 0
    out = capsys.readouterr().out
    assert out.startswith("small: 2 clients, 16 training samples in all, batches of 4, 3 epochs\n")
    assert "with every segment as fast as it was here, just now" in out
    assert "A batch of 4 cannot be cut into micro-batches of at least 16 samples." in out
    assert "`training: {micro_batches: 1}`; now it is 2." in out


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cuts.svg"
    assert run(*PUBLISHED, "--svg", str(file)) == 0
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    space = "{http://www.w3.org/2000/svg}"
    bars = [one for one in root.iter(f"{space}rect") if one.get("rx") == "2"]
    assert len(bars) == 2 * 20
    tall = [float(one.get("height", "0")) for one in bars]
    assert tall[0] > tall[2] > tall[9]  # conv1, pool1, pool3: fewer and fewer bytes
    assert [round(one / 120, 3) for one in tall[20:22]] == [0.003, 0.116]  # the client's share
    capsys.readouterr()
    assert run(*PUBLISHED, "--svg", "-") == 0
    assert capsys.readouterr().out == file.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        run(*PUBLISHED, "--svg", str(tmp_path / "no" / "cuts.svg"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "nothing to plan"),
        ("folder --model vgg16", "more than one thing to plan"),
        ("--published --model vgg16", "more than one thing to plan"),
        ("folder --cut conv1", "--cut with a FOLDER"),
        ("--model vgg16 --cut cnv1", "no layer `cnv1` to cut after"),
        ("--model vgg", "no network `vgg`"),
        ("--model vgg16 --input 3x32", "--input 3x32"),
        ("--model vgg16 --input 0x32x32", "--input 0x32x32"),
        ("--model vgg16 --clients 0", "--clients 0"),
        ("--model vgg16 --samples -5", "--samples -5"),
        ("--model vgg16 --samples 5", "--samples 5 for 10 clients"),
        ("--model vgg16 --json --svg -", "--json and --svg - both write to standard output"),
        ("--model vgg16 --epochs nan", "--epochs nan"),
        ("--model vgg16 --epochs 0", "--epochs 0"),
        ("--model vgg16 --local-epochs -1", "--local-epochs -1"),
        ("--model vgg16 --bandwidth fast", "--bandwidth fast"),
        ("--model vgg16 --bandwidth 0mbit", "--bandwidth 0"),
        ("--model vgg16 --delay 25", "--delay 25"),
        ("--model vgg16 --input 3x32x32 --cut conv1 --gflops client=1", None),
        ("--model vgg16 --input 3x32x32 --cut conv1 --gflops x=1", "no party `x`"),
        ("--model vgg16 --input 3x32x32 --cut conv1 --cut conv1", "--cut conv1 --cut conv1"),
    ],
)
def test_mistakes_are_told_with_what_to_do(arguments: str, words: str | None) -> None:
    if words is None:
        assert run(*arguments.split(), "--json") == 0
        return
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        run(*arguments.split())
    assert caught.value.expected
    assert caught.value.fix
