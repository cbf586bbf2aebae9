"""The report of attacks, and the command that writes it: what stands on the page, and that nothing else gets in or out.

Here: made-up outcomes, a browser's rules for what a page may load, a second decoder for pictures; the command run on a
small folder with attacks that are made up, so that the page and exit codes are tested and not the attacks.  Not here:
the attacks (``test_attack_*``), what the command says to mistakes (``tests/transcripts``).
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import stat
import typing
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from PIL import Image

from splitsec.attacks import catalogue
from splitsec.attacks.outcome import Case, Curve, Outcome, Picture, Pictures, Verdict
from splitsec.attacks.report import MEANINGS, Failed, clean, numbers, page, png, save, sentence, short, summary
from splitsec.cli import main
from tests.conftest import Shell, write_folder

HOSTILE: Final = '</style><script src="https://evil.example/x.js">alert(1)</script><img src=x onerror=alert(1)>"\'&'

GREY: Final = Picture(3, 2, 1, bytes([0, 50, 100, 150, 200, 255]))
COLOUR: Final = Picture(2, 2, 3, bytes(range(0, 240, 20)))


def outcome(verdict: Verdict = "recovered", **more: object) -> Outcome:
    made = Outcome(
        attack="inversion",
        title="Decoder inversion",
        adversary="an honest server",
        source="He et al. 2019",
        verdict=verdict,
        sentence="The server rebuilt images.",
    )
    return replace(made, **more)  # type: ignore[arg-type]


def full(**more: object) -> Outcome:
    """One outcome with all that an outcome can have."""
    parts: dict[str, object] = {
        "defences": ("detectors",),
        "batches": 510,
        "stopped_at_batch": 120,
        "stopped_by": "decoys",
        "reconstruction_mse": 0.19,
        "baseline_mse": 0.38,
        "figures": {"area under the curve": 0.75},
        "curves": (
            Curve("first", tuple((float(x), 1 / (1 + x / 50)) for x in range(0, 510, 5)), "batches", "error"),
            Curve("second", ((0.0, 0.9), (500.0, 0.2)), "batches", "error"),
            Curve("alone", ((3.0, -2.0),), "steps", "gain"),
        ),
        "pictures": (Pictures("originals", (GREY,) * 8), Pictures("rebuilt", (COLOUR,) * 8)),
        "cases": (Case("replay", "an old gradient", True, "refused"), Case("NaN", "one NaN", False, "it got in")),
    }
    return outcome(**{**parts, **more})


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text between them, as a browser reads them."""

    VOID: Final = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.found if name == tag)


def hostile() -> Outcome:
    """Whatever a graph, a party or a log could bring in, in every field that is text."""
    return full(
        attack=HOSTILE,
        title=HOSTILE,
        adversary=HOSTILE,
        source=HOSTILE,
        sentence=HOSTILE,
        defences=(HOSTILE,),
        stopped_by=HOSTILE,
        figures={HOSTILE: 0.5},
        curves=(Curve(HOSTILE, ((0.0, 0.0), (1.0, 1.0)), HOSTILE, HOSTILE),),
        pictures=(Pictures(HOSTILE, (GREY,)),),
        cases=(Case(HOSTILE, HOSTILE, False, HOSTILE),),
    )


def test_the_page_is_well_formed_and_names_everything() -> None:
    text = page("examples/vanilla", [full()], undefended=False, tries={"inversion": "trains a decoder"})
    elements = Elements(text)
    assert elements.open == []
    said = " ".join(" ".join(elements.text).split())
    for words in (
        "examples/vanilla",
        "One attack was run (Decoder inversion), and it got something.",
        "The server rebuilt images.",
        "an honest server",
        "trains a decoder",
        "He et al. 2019",
        "detectors",
        "0.19",
        "average image every time has 0.38, so 50% of that error is left",
        "0.5 is guessing",
        "decoys, in batch 120",
        "originals",
        "rebuilt",
        "replay: held",
        "NaN: not held",
    ):
        assert words in said, words
    assert said.index("NaN: not held") < said.index("replay: held"), "what did not hold stands first"
    links = [attributes["href"] for attributes in elements.of("a")]
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert links and {link.removeprefix("#") for link in links} <= ids
    assert all(attributes["alt"] for attributes in elements.of("img"))
    assert {"viewport", "color-scheme"} <= {attributes.get("name") for attributes in elements.of("meta")}


@pytest.mark.threat("T136")
def test_nothing_is_loaded_and_nothing_runs() -> None:
    """No element that could fetch or run, no address but data: pictures, and a policy that says so to the browser."""
    text = page(HOSTILE, [hostile(), full()], undefended=True, failed=[Failed(HOSTILE, HOSTILE, HOSTILE)])
    elements = Elements(text)
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "p", "h1", "h2", "h3", "span"),
        *("table", "thead", "tbody", "tr", "th", "td", "a", "dl", "dt", "dd", "div", "ul", "li", "code", "pre", "em"),
        *("strong", "figure", "figcaption", "img", "svg", "circle", "path", "rect", "line", "polyline", "text"),
    }
    assert {tag for tag, _ in elements.found} <= allowed
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcset", "xlink:href")]
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/png;base64,")
        if "href" in attributes:
            assert tag == "a" and re.fullmatch(r"#(attack-\d+|failed)", attributes["href"])
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] for a in elements.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy, "the browser would show the page bare"


@pytest.mark.threat("T136")
def test_hostile_names_are_shown_and_not_obeyed() -> None:
    text = page(HOSTILE, [hostile()], undefended=False, about={HOSTILE: HOSTILE}, waiting=[HOSTILE])
    assert "<script" not in text and "onerror=alert(1)>" not in text
    assert text.count("</style>") == 1
    said = "".join(Elements(text).text)
    assert said.count(HOSTILE) >= 15, "shown as text, to the letter"


@pytest.mark.threat("T136")
def test_control_and_direction_characters_do_not_get_through() -> None:
    nasty = "a\x1b[31mb\x00c\u202ed\ud800e\nf"
    assert clean(nasty) == "a\ufffd[31mb\ufffdc\ufffdd\ufffde f"
    text = page(nasty, [outcome(sentence=nasty)], undefended=False)
    assert not set("\x1b\x00\u202e\ud800") & set(text)
    text.encode()


@pytest.mark.parametrize("picture", [GREY, COLOUR, Picture(1, 1, 1, b"\x07"), Picture(28, 28, 1, bytes(784))])
def test_a_png_decodes_to_its_pixels(picture: Picture) -> None:
    """By a second implementation."""
    image = Image.open(io.BytesIO(png(picture)))
    image.load()
    assert image.format == "PNG" and image.size == (picture.width, picture.height)
    assert image.mode == {1: "L", 3: "RGB"}[picture.channels]
    assert image.tobytes() == picture.pixels


@pytest.mark.parametrize(
    "picture", [Picture(2, 2, 1, b"123"), Picture(1, 1, 2, b"12"), Picture(0, 1, 1, b""), Picture(1, 1, 4, b"1234")]
)
def test_what_is_no_picture_is_refused(picture: Picture) -> None:
    with pytest.raises(ValueError, match="no picture"):
        png(picture)


def test_pictures_on_the_page_are_the_pictures() -> None:
    """Originals above what was made of them, column by column, also where the row is broken."""
    greys = tuple(Picture(1, 1, 1, bytes([value])) for value in range(8))
    rebuilt = tuple(Picture(1, 1, 1, bytes([100 + value])) for value in range(8))
    text = page("f", [outcome(pictures=(Pictures("originals", greys), Pictures("rebuilt", rebuilt)))], undefended=False)
    blocks = text.split('<div class="block">')[1:]
    shown = []
    for block in blocks:
        rows = block.split('<div class="row">')[1:]
        values = [
            [
                Image.open(io.BytesIO(base64.b64decode(one))).getpixel((0, 0))
                for one in re.findall(r"base64,([^\"]+)", row)
            ]
            for row in rows
        ]
        assert len(values) == 2 and [value + 100 for value in values[0]] == values[1]
        shown += values[0]
    assert shown == list(range(8)) and len(blocks) == 2


def plots(text: str) -> list[ET.Element]:
    """The plots of a page, parsed as XML."""
    return [ET.fromstring(one) for one in re.findall(r'<svg viewBox="0 0 420 236".*?</svg>', text, re.DOTALL)]


def points_of(line: ET.Element) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in line.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_curves_lie_inside_their_plot_where_their_numbers_say() -> None:
    text = page("f", [full()], undefended=False)
    first, second = plots(text)
    grid = [line for line in first.iter("line") if line.attrib["class"] == "grid"]
    left, right = float(grid[0].attrib["x1"]), float(grid[0].attrib["x2"])
    ticks = {
        text.text: float(text.attrib["y"]) - 4 for text in first.iter("text") if text.attrib["class"] == "tick end"
    }
    bottom, top = max(ticks.values()), min(ticks.values())
    lines = [points_of(line) for line in first.iter("polyline")]
    assert len(lines) == 2
    for line in lines:
        assert all(left <= x <= right and top <= y <= bottom for x, y in line)
    assert ticks.keys() >= {"0.00", "0.50", "1.00"} or ticks.keys() >= {"0.0", "0.5", "1.0"}
    unit = (bottom - top) / (float(max(ticks)) - float(min(ticks)))
    assert lines[0][0] == pytest.approx((left, bottom - unit * 1.0), abs=0.1)
    assert lines[1][-1][1] == pytest.approx(bottom - unit * 0.2, abs=0.1)
    level = next(line for line in first.iter("line") if line.attrib["class"] == "level")
    assert float(level.attrib["y1"]) == pytest.approx(bottom - unit * 0.38, abs=0.1)
    stop = next(line for line in first.iter("line") if line.attrib["class"] == "stop")
    assert float(stop.attrib["x1"]) == pytest.approx(left + (right - left) * 120 / 505, abs=0.1)
    assert not list(second.iter("polyline")) and len(list(second.iter("circle"))) == 1, "one point is a dot"
    assert {"batches", "steps"} <= {text.text for plot in (first, second) for text in plot.iter("text")}


@pytest.mark.parametrize(
    "points",
    [
        ((0.0, 0.0), (1.0, 0.0)),
        ((5.0, 1e-9), (6.0, 3e-9)),
        ((0.0, -1e12), (1.0, 1e12)),
        ((0.0, 7.0),),
        ((0.0, float("nan")), (1.0, 1.0), (2.0, float("inf"))),
        tuple((float(x), float(x == 5000)) for x in range(10_000)),
    ],
)
def test_any_curve_can_be_drawn(points: tuple[tuple[float, float], ...]) -> None:
    (plot,) = plots(page("f", [outcome(curves=(Curve("c", points),))], undefended=False))
    for line in plot.iter("polyline"):
        drawn = points_of(line)
        assert len(drawn) < 700
        assert all(50 <= x <= 410 and 0 <= y <= 195 for x, y in drawn)
        if len(points) == 10_000:
            assert min(y for _, y in drawn) == pytest.approx(22, abs=0.1), "the one peak is kept"


def test_a_rate_is_drawn_from_nothing_to_all() -> None:
    curve = Curve("c", ((0.0, 1.0), (1.0, 1.0)), "batches", "share right")
    (plot,) = plots(page("f", [outcome(curves=(curve,))], undefended=False))
    ticks = [text.text for text in plot.iter("text") if text.attrib["class"] == "tick end"]
    assert (ticks[0], ticks[-1]) == ("0.00", "1.00")


def test_a_curve_without_a_number_is_left_out() -> None:
    assert not plots(page("f", [outcome(curves=(Curve("c", ((0.0, float("nan")),)),))], undefended=False))


def test_a_number_is_told_with_what_it_is_to_be_held_against() -> None:
    def reading(**more: object) -> str:
        return numbers(outcome(**more))[0].reading

    assert "6% of that error is left" in reading(reconstruction_mse=0.022, baseline_mse=0.38)
    assert "average sample" in reading(reconstruction_mse=0.022, baseline_mse=0.38)
    assert "this is no better" in reading(reconstruction_mse=0.37, baseline_mse=0.38)
    assert "this is worse" in reading(reconstruction_mse=0.5, baseline_mse=0.38)
    assert reading(reconstruction_mse=0.5, baseline_mse=0.0) == "0 is a perfect copy"
    assert reading(figures={"AUC by norm": 0.6}) == reading(figures={"area under the curve": 0.6})
    assert "0.5 is guessing" in reading(figures={"auc_by_norm": 0.6})
    assert numbers(outcome(figures={"auc_by_norm": 0.6}))[0].name == "area under the curve by norm"
    cases = (Case("c", "t", True, "s"),)
    assert [one.name for one in numbers(outcome(figures={"cases": 1, "held": 1}, cases=cases))] == ["cases held"]
    told = {"accuracy of labels": 0.6, "accuracy of labels, guessing": 0.1, "odd, guessing": 0.2}
    by_name = {one.name: one for one in numbers(outcome(figures=told))}
    assert list(by_name) == ["accuracy of labels", "odd, guessing"]
    assert by_name["accuracy of labels"].reading == "0.1 is guessing"
    assert by_name["accuracy of labels"].gauge == (0.6, 1.0, 0.1)
    assert [short(value) for value in (0, 1.0, 0.05823, 12.345, 1234.5, 1e-7, float("nan"))] == [
        *("0", "1", "0.0582", "12.3", "1,234", "1.00e-07", "no number")
    ]


def test_a_sentence_ends_and_says_where_nothing_was_run() -> None:
    assert sentence(outcome(sentence="clinic-a left")) == "clinic-a left."
    assert sentence(outcome(sentence="Did it?")) == "Did it?"
    assert sentence(outcome("does not apply", sentence="there is no relay")) == "It was not run: there is no relay."


def test_the_verdict_over_all() -> None:
    a, b, c = (outcome(title=f"attack {name}") for name in "abc")
    assert summary([a, b, replace(c, verdict="stopped"), replace(c, verdict="refused")], undefended=False) == (
        "Of 4 attacks, 2 got something: attack a; and attack b. One was stopped by a detector before what the "
        "attacker held was worth anything. One was turned away in everything that it tried."
    )
    nothing = [replace(one, verdict="nothing recovered") for one in (a, b)]
    assert summary([*nothing, replace(c, verdict="does not apply")], undefended=True) == (
        "With the folder's own and the default defences switched off: of 2 attacks, none got anything. Two ran to "
        "the end and came away with nothing better than a guess. One does not apply to this graph."
    )
    assert summary([], undefended=False, failed=[Failed("x", "x", "why")]).startswith("No attack came to its end.")


def test_a_page_without_a_finding_says_that_this_proves_nothing() -> None:
    good = page("f", [outcome("refused"), outcome("stopped")], undefended=False)
    assert "no proof that nothing can be got" in good
    bad = page("f", [outcome("recovered")], undefended=False)
    assert "no proof that nothing can be got" not in bad
    for text in (good, bad):
        assert "What this page does not say" in text
        for verdict in MEANINGS:
            assert html.escape(verdict) in text
    assert "switched off" in page("f", [outcome()], undefended=True)
    assert "Keep this page where the data may be kept" in page("f", [full()], undefended=False)


@pytest.mark.parametrize("verdict", typing.get_args(Verdict))
def test_every_verdict_has_a_page_a_block_and_a_word_in_the_summary(
    verdict: Verdict, capsys: pytest.CaptureFixture[str]
) -> None:
    from splitsec.cli.attack import print_outcome

    one = outcome(verdict)
    assert html.escape(verdict) in page("f", [one], undefended=False)
    print_outcome(one)
    assert verdict in capsys.readouterr().out
    if verdict not in ("recovered", "partly recovered", "does not apply"):
        assert len(summary([one, one, outcome("recovered")], undefended=False).split(". ")) == 2
    assert MEANINGS[verdict] in html.unescape(page("f", [one], undefended=False))


def test_abuse_that_was_not_all_turned_away_is_not_called_nothing() -> None:
    assert summary([outcome("not all held")], undefended=False).endswith("and not all of it was turned away.")
    assert "verdict some" in page("f", [outcome("not all held")], undefended=False)
    assert "verdict good" in page("f", [outcome("refused")], undefended=False)


def test_the_page_states_what_counts_as_recovered_as_the_attacks_do() -> None:
    from splitsec.attacks.attack import PARTLY, RECOVERED

    text = " ".join(page("f", [outcome()], undefended=False).split())
    assert (RECOVERED, f"up to {PARTLY:.0%}") == (0.5, "up to 85%")
    assert "half of that error or less counts as recovered, up to 85 % of it as partly recovered" in text


@pytest.mark.threat("T135")
def test_a_report_is_written_all_at_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    save(file, "old")
    with pytest.raises(UnicodeEncodeError):
        save(file, "new \ud800")
    assert file.read_text() == "old"
    save(file, "new \N{EURO SIGN}")
    assert file.read_text(encoding="utf-8") == "new \N{EURO SIGN}"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"], "nothing else is left"


# --- the command

MADE: Final = """
from pathlib import Path

from splitsec.attacks.outcome import Case, Outcome
from splitsec.errors import UserError


class Made:
    def __init__(self):
        self.name = type(self).__name__.lower()

    def run(self, ground):
        verdict, sentence = self.go(ground)
        ground.report({"event": "progress", "done": 1, "of": 2})
        ground.report({"event": "warning", "party": "clinic-a", "text": "once is enough"})
        return Outcome(self.name, self.name, "who", "where", verdict, sentence, cases=(Case("c", "t", True, "s"),))


class First(Made):
    def go(self, ground):
        return "recovered", "the first got something"


class Second(Made):
    def go(self, ground):
        seen = Path("report.html").read_text() if Path("report.html").exists() else ""
        Path("seen.html").write_text(seen)
        raise KeyError("a fault")


class Third(Made):
    def go(self, ground):
        return "stopped", f"seed {ground.graph.training.seed}, undefended {ground.undefended}"
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder, and three attacks in place of the real ones: one gets something, one breaks, one is stopped."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "made_attacks.py").write_text(MADE)
    monkeypatch.syspath_prepend(str(code))
    entries = {
        name: catalogue.Entry(name, name, "who", "where", "tries", f"made_attacks:{name.title()}")
        for name in ("first", "second", "third")
    }
    monkeypatch.setattr(catalogue, "ATTACKS", entries)
    monkeypatch.chdir(tmp_path)
    return write_folder(tmp_path / "small")


def test_an_attack_that_breaks_does_not_lose_the_others(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["attack", "small", "--attack", "all", "--report", "report.html", "--json", "--seed", "5"])
    printed = capsys.readouterr()
    assert code == 70
    document = json.loads(printed.out)
    assert (document["folder"], document["seed"], document["undefended"]) == ("small", 5, False)
    assert [(one["attack"], one["verdict"]) for one in document["attacks"]] == [
        *(("first", "recovered"), ("second", "failed"), ("third", "stopped"))
    ]
    keys = {"attack", "defences", "batches", "stopped_at_batch", "reconstruction_mse", "baseline_mse", "verdict"}
    assert all(keys <= one.keys() for one in document["attacks"])
    assert "a fault" in document["attacks"][1]["error"]
    assert "second failed, the others go on" in printed.err and "Traceback" not in printed.err
    assert printed.err.count("once is enough") == 1
    seen, text = Path("seen.html").read_text(), Path("report.html").read_text()
    assert "the first got something" in seen and "1 of 3 attacks are done" in seen, "a page is there on the way"
    assert "seed 5, undefended False" in text and "What could not be run" in text and "on the way" not in text


def test_what_was_got_is_no_error(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "small", "--attack", "first", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("first (first): recovered\n  the first got something.\n")
    assert "held  c: t. s" in printed.out
    assert main(["attack", "small", "--attack", "third", "--undefended", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["sentence"] == "seed 7, undefended True"


def test_an_attack_on_its_own_that_breaks_is_a_fault(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "small", "--attack", "second"]) == 70
    printed = capsys.readouterr()
    assert printed.out == "" and "a fault" in printed.err


def test_the_catalogue_loads_no_torch(shell: Shell) -> None:
    """Listing is quick, and works before anything is installed for training."""
    blocked = shell.cwd / "blocked" / "torch"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('torch was loaded')")
    end = shell.run("attack", "--list", PYTHONPATH=f"{blocked.parent}:{shell.env['PYTHONPATH']}")
    assert (end.code, end.stderr) == (0, "")
    assert [line.split()[0] for line in end.stdout.splitlines() if line[0] != " "] == list(catalogue.ATTACKS)
    listed = json.loads(shell.run("attack", "--list", "--json").stdout)
    assert [one["name"] for one in listed] == list(catalogue.ATTACKS)
