"""Whose privacy each lane costs, and what is done to what leaves on it: the graph's floors with a party's own policy.

Pure: graphs, party files and plans, nothing started.  What is demanded is done in test_safeguards.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from splitsec.demands import Demand, check_demands, demands_of, learnt_from
from splitsec.errors import BelowFloor, GraphError, PartyFileError
from splitsec.graph import Graph, parse_graph
from splitsec.partyfile import PartyFile, load_folder, load_party
from splitsec.plan import make_plan
from splitsec.privacy.policy import LabelPolicy, Policy
from splitsec.privacy.release import Gaussian, Laplace, RandomisedResponse

EXAMPLES = Path(__file__).parents[2] / "examples"


def told(graph: Graph, party_file: PartyFile) -> dict[str, str]:
    """Each lane of a party, in words, and what it carries."""
    demands = demands_of(graph, party_file, make_plan(graph, party_file.party))
    return {
        f"{demand.lane.kind} {demand.lane.name} to {demand.lane.peer}": " and ".join(sorted(demand.carries))
        for demand in demands.values()
    }


# --- what lanes carry

CLINIC = {"activation stem -> trunk to server": "inputs", "labels clinics -> trunk to server": "labels"}
BENT = {
    "activation stem -> trunk to server": "inputs",
    "gradient trunk -> head to server": "inputs and labels",  # a skip edge brings inputs to the head, too
}
BUSY = {
    "activation stem -> digit to digit-server": "inputs",
    "activation stem -> parity to parity-server": "inputs",
    "labels clinics -> digit to digit-server": "labels",
    "labels clinics -> parity to parity-server": "labels",
}
CARRIED: dict[str, dict[str, dict[str, str]]] = {
    "vanilla": {
        "clinic-a": CLINIC,
        "clinic-b": CLINIC,
        "clinic-c": CLINIC,
        "server": {f"gradient stem -> trunk to clinic-{k}": "" for k in "abc"},
    },
    "u-shaped": {
        "clinic-a": BENT,
        "clinic-b": BENT,
        "server": {
            f"{lane} to clinic-{k}": "" for k in "ab" for lane in ("gradient stem -> trunk", "activation trunk -> head")
        },
    },
    "vertical": {
        "hospital": {"activation size -> diagnosis to registry": "inputs"},
        "laboratory": {"activation shape -> diagnosis to registry": "inputs"},
        "registry": {
            "gradient size -> diagnosis to hospital": "labels",
            "gradient shape -> diagnosis to laboratory": "labels",
        },
    },
    "extended-vanilla": {
        "scanner-upper": {"activation upper -> joined to ward": "inputs"},
        "scanner-lower": {"activation lower -> joined to ward": "inputs"},
        "ward": {
            "activation joined -> trunk to server": "",
            "gradient upper -> joined to scanner-upper": "",
            "gradient lower -> joined to scanner-lower": "",
            "labels ward -> trunk to server": "labels",
        },
        "server": {"gradient joined -> trunk to ward": ""},
    },
    "multi-hop": {
        "clinic": {"activation first -> second to hospital": "inputs", "labels clinic -> fourth to server": "labels"},
        "hospital": {"activation second -> third to institute": "", "gradient first -> second to clinic": ""},
        "institute": {"activation third -> fourth to server": "", "gradient second -> third to hospital": ""},
        "server": {"gradient third -> fourth to institute": ""},
    },
    "multi-task": {
        "clinic-a": BUSY,
        "clinic-b": BUSY,
        "clinic-c": BUSY,
        "digit-server": {f"gradient stem -> digit to clinic-{k}": "" for k in "abc"},
        "parity-server": {f"gradient stem -> parity to clinic-{k}": "" for k in "abc"},
    },
}


@pytest.mark.parametrize("name", CARRIED)
def test_what_the_examples_lanes_carry(name: str) -> None:
    folder = load_folder(EXAMPLES / name)
    assert {party: told(folder.graph, file) for party, file in folder.parties.items()} == CARRIED[name]


PARTIES = """\
splitsec: 1
name: hand-made
parties:
  clinic: {}
  ward: {listen: "tcp://127.0.0.1:7401"}
  server: {listen: "tcp://127.0.0.1:7400"}
"""


def graph_of(segments: str, cuts: str, labels: str, more: str = "") -> Graph:
    """``NAME PARTY [data] [loss]``, ``FROM TO``, ``PARTY TO``, a line for each; cuts carry four floats."""
    text = PARTIES + "segments:\n"
    for name, party, *what in (line.split() for line in segments.splitlines()):
        keys = "".join({"data": ", data: x", "loss": ", loss: cross_entropy"}[one] for one in what)
        text += f"  {name}: {{at: {party}{keys}}}\n"
    text += "cuts:\n"
    for source, target in (line.split() for line in cuts.splitlines()):
        text += f"  - {{from: {source}, to: {target}, shape: [4], dtype: float32}}\n"
    text += "labels:\n"
    for party, target in (line.split() for line in labels.splitlines()):
        text += f"  - {{from: {party}, to: {target}}}\n"
    return parse_graph(text + more)


LONG_U = ("stem clinic data\ntrunk server\nmiddle clinic\nhead clinic loss", "stem trunk\ntrunk middle\nmiddle head")
HAND_MADE: dict[str, tuple[Graph, dict[str, dict[str, str]]]] = {
    "a chain inside one party: what leaves at its end was made of inputs at its beginning": (
        graph_of(
            "first clinic data\nsecond clinic\nthird clinic\ntrunk ward\nlast server loss",
            "first second\nsecond third\nthird trunk\ntrunk last",
            "clinic last",
        ),
        {
            "clinic": {"activation third -> trunk to ward": "inputs", "labels clinic -> last to server": "labels"},
            "ward": {"activation trunk -> last to server": "", "gradient third -> trunk to clinic": ""},
            "server": {"gradient trunk -> last to ward": ""},
        },
    ),
    "a party that holds labels and nothing else": (
        graph_of("stem clinic data\ntrunk server loss", "stem trunk", "ward trunk"),
        {
            "clinic": {"activation stem -> trunk to server": "inputs"},
            "ward": {"labels ward -> trunk to server": "labels"},
            "server": {"gradient stem -> trunk to clinic": ""},
        },
    ),
    "a head with labels of its own: its gradient tells about them": (
        graph_of("stem clinic data\ntrunk server\nhead ward loss", "stem trunk\ntrunk head", "ward head"),
        {
            "clinic": {"activation stem -> trunk to server": "inputs"},
            "ward": {"gradient trunk -> head to server": "labels"},
            "server": {"activation trunk -> head to ward": "", "gradient stem -> trunk to clinic": ""},
        },
    ),
    "a head whose labels somebody else gives: its gradient costs its party nothing": (
        graph_of("stem clinic data\ntrunk server\nhead ward loss", "stem trunk\ntrunk head", "clinic head"),
        {
            "clinic": {"activation stem -> trunk to server": "inputs", "labels clinic -> head to ward": "labels"},
            "ward": {"gradient trunk -> head to server": ""},
            "server": {"activation trunk -> head to ward": "", "gradient stem -> trunk to clinic": ""},
        },
    ),
    "labels two segments further on at the same party; the inputs went by way of another": (
        graph_of(*LONG_U, "clinic head", "exchanges: [{name: e, from: ward, to: server, shape: [1], dtype: float32}]"),
        {
            "clinic": {"activation stem -> trunk to server": "inputs", "gradient trunk -> middle to server": "labels"},
            "server": {"activation trunk -> middle to clinic": "", "gradient stem -> trunk to clinic": ""},
        },
    ),
    "a segment that reads data of its own beside what it is sent": (
        graph_of("stem clinic data\nfusion ward data\ntrunk server loss", "stem fusion\nfusion trunk", "clinic trunk"),
        {
            "clinic": {"activation stem -> fusion to ward": "inputs", "labels clinic -> trunk to server": "labels"},
            "ward": {"activation fusion -> trunk to server": "inputs", "gradient stem -> fusion to clinic": "inputs"},
            "server": {"gradient fusion -> trunk to ward": ""},
        },
    ),
    "a branch: a loss here and another elsewhere": (
        graph_of(
            "stem clinic data\nmiddle ward\nside ward loss\ntrunk server loss",
            "stem middle\nmiddle side\nmiddle trunk",
            "ward side\nclinic trunk",
        ),
        {
            "clinic": {"activation stem -> middle to ward": "inputs", "labels clinic -> trunk to server": "labels"},
            "ward": {"activation middle -> trunk to server": "", "gradient stem -> middle to clinic": "labels"},
            "server": {"gradient middle -> trunk to ward": ""},
        },
    ),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_what_lanes_carry(name: str) -> None:
    graph, expected = HAND_MADE[name]
    assert {party: told(graph, PartyFile(party=party)) for party in expected} == expected


def test_what_segments_learn_from() -> None:
    def learnt(graph: Graph, party: str) -> dict[str, str]:
        return {name: " and ".join(sorted(own)) for name, own in learnt_from(make_plan(graph, party)).items()}

    vanilla, bent = (load_folder(EXAMPLES / name).graph for name in ("vanilla", "u-shaped"))
    assert learnt(vanilla, "clinic-b") == {"stem": "inputs"}
    assert learnt(vanilla, "server") == {"trunk": ""}
    assert learnt(bent, "clinic-b") == {"stem": "inputs and labels", "head": "inputs and labels"}
    assert learnt(load_folder(EXAMPLES / "vertical").graph, "registry") == {"diagnosis": "labels"}
    bypassed, _ = HAND_MADE["labels two segments further on at the same party; the inputs went by way of another"]
    assert learnt(bypassed, "clinic") == {"stem": "inputs", "middle": "labels", "head": "labels"}


# --- floors and own policies

FLOORS = """\
splitsec: 1
name: floors
parties:
  clinic: {}
  server: {listen: "tcp://127.0.0.1:7400"}
segments:
  stem: {at: clinic, data: x}
  trunk: {at: server, loss: cross_entropy}
  side: {at: server, loss: mse}
cuts:
  - from: stem
    to: trunk
    shape: [2, 3]
    dtype: float32
    privacy: {forward: {clip: 1.5, noise: gaussian, noise_multiplier: 2.0}, backward: {clip: 0.5}}
  - {from: stem, to: side, shape: [4], dtype: float32}
labels:
  - {from: clinic, to: trunk, privacy: {epsilon: 2.0, classes: 3}}
  - {from: clinic, to: side, field: dose, shape: [1], dtype: float32}
"""
OWN = """\
party: {party}
segments: {{stem: {{model: "models:stem", optimizer: {{name: sgd, lr: 0.1}}}}}}
data: {{train: "data:train"}}
privacy:
  delta: 1.0e-6
"""
GAUSSIAN = "{clip: 1.0, noise: gaussian, noise_multiplier: 3.0}"
TO_TRUNK = "{from: stem, to: trunk, "


def own(tmp_path: Path, *lines: str, party: str = "clinic") -> PartyFile:
    """A party file whose `privacy` has ``lines``, the first of them on line 6 of the file."""
    file = tmp_path / f"{party}.yaml"
    file.write_text(OWN.format(party=party) + "".join(f"  {line}\n" for line in lines))
    return load_party(file)


def demanded(party_file: PartyFile, graph: str = FLOORS) -> dict[str, Demand]:
    """The demands by kind and target of the lane."""
    parsed = parse_graph(graph)
    demands = demands_of(parsed, party_file, make_plan(parsed, party_file.party))
    return {f"{one.lane.kind} {one.lane.name.split(' -> ')[1]}": one for one in demands.values()}


def policies(party_file: PartyFile, graph: str = FLOORS) -> dict[str, Policy | LabelPolicy | None]:
    return {name: demand.policy for name, demand in demanded(party_file, graph).items()}


FLOOR: dict[str, Policy | LabelPolicy | None] = {
    "activation trunk": Policy(1.5, "gaussian", 2.0),
    "activation side": None,
    "labels trunk": LabelPolicy(2.0, 3),
    "labels side": None,
}


def test_without_an_own_policy_the_floor_applies(tmp_path: Path) -> None:
    assert policies(PartyFile(party="clinic")) == FLOOR
    assert policies(own(tmp_path, "epsilon: 100.0")) == FLOOR
    assert policies(PartyFile(party="server")) == {"gradient trunk": Policy(0.5), "gradient side": None}


def test_what_a_demand_says_about_itself() -> None:
    demands = demanded(PartyFile(party="clinic"))
    assert demands["activation trunk"].mechanism == Gaussian(2.0, 6)  # 2 x 3 numbers a sample
    assert demands["activation trunk"].clip == 1.5
    assert demands["labels trunk"].mechanism == RandomisedResponse(2.0, 3)
    assert demands["labels trunk"].clip is None
    assert demands["activation side"].mechanism is None
    back = demanded(PartyFile(party="server"))["gradient trunk"]
    assert (back.mechanism, back.clip) == (None, 0.5)
    assert [str(one) for one in demands.values()] == [
        "clip 1.5, gaussian 2",
        "as it is",
        "randomised response 2 of 3 classes",
        "as it is",
    ]


def test_who_may_carry_samples_as_they_are() -> None:
    raw = FLOORS.replace("shape: [4], dtype: float32}", "shape: [4], dtype: float32, raw: true}")
    assert {name: one.raw for name, one in demanded(PartyFile(party="clinic"), raw).items()} == {
        "activation trunk": False,
        "activation side": True,
        "labels trunk": True,
        "labels side": True,
    }
    assert not demanded(PartyFile(party="clinic"))["activation side"].raw


def test_a_stricter_policy_of_its_own_wins(tmp_path: Path) -> None:
    stricter = own(
        tmp_path,
        "cuts:",
        f"  - {TO_TRUNK}forward: {GAUSSIAN}}}",
        "  - {from: stem, to: side, forward: {clip: 2.0, noise: laplace, noise_multiplier: 0.5}}",
        "labels: [{to: trunk, epsilon: 1.0}]",
    )
    assert policies(stricter) == {
        "activation trunk": Policy(1.0, "gaussian", 3.0),
        "activation side": Policy(2.0, "laplace", 0.5),
        "labels trunk": LabelPolicy(1.0, 3),
        "labels side": None,
    }
    assert demanded(stricter)["activation side"].mechanism == Laplace(0.5, 4)
    equal = own(tmp_path, f"cuts: [{TO_TRUNK}forward: {{clip: 1.5, noise: gaussian, noise_multiplier: 2.0}}}}]")
    assert policies(equal) == FLOOR


def test_a_policy_is_for_its_own_direction_alone(tmp_path: Path) -> None:
    only_back = own(tmp_path, f"cuts: [{TO_TRUNK}backward: {{clip: 0.1}}}}]")
    with pytest.raises(PartyFileError, match="over which this party sends nothing backward"):
        policies(only_back)
    server = own(
        tmp_path, f"cuts: [{TO_TRUNK}backward: {{clip: 0.1, noise: gaussian, noise_multiplier: 1.0}}}}]", party="server"
    )
    assert policies(server) == {"gradient trunk": Policy(0.1, "gaussian", 1.0), "gradient side": None}


def test_a_policy_is_for_every_output_over_its_cut(tmp_path: Path) -> None:
    """Two cuts between the same segments, told apart by `output`."""
    two = FLOORS.replace("{from: stem, to: side, ", "{from: stem, to: side, output: a, ").replace(
        "labels:\n", "  - {from: stem, to: side, output: b, shape: [4], dtype: float32}\nlabels:\n"
    )
    two = two.replace("    dtype: float32\n", "    dtype: float32\n    output: c\n")
    parsed = parse_graph(two)
    file = own(tmp_path, f"cuts: [{{from: stem, to: side, forward: {GAUSSIAN}}}]")
    demands = demands_of(parsed, file, make_plan(parsed, "clinic"))
    asked = [one.policy for one in demands.values() if one.lane.name == "stem -> side" and one.lane.kind != "labels"]
    assert asked == [Policy(1.0, "gaussian", 3.0)] * 2


UNDER: dict[str, tuple[str, str]] = {
    "cuts: [{from: stem, to: trunk, forward: {clip: 2.0, noise: gaussian, noise_multiplier: 2.0}}]": (
        "clinic",
        "the cut stem -> trunk, forward: clip 2, where at most 1.5 is allowed",
    ),
    "cuts: [{from: stem, to: trunk, forward: {clip: 1.0}}]": (
        "clinic",
        "the cut stem -> trunk, forward: no noise, where gaussian noise is demanded",
    ),
    "cuts: [{from: stem, to: trunk, forward: {clip: 1.0, noise: laplace, noise_multiplier: 9.0}}]": (
        "clinic",
        "the cut stem -> trunk, forward: laplace noise, where gaussian noise is demanded",
    ),
    "cuts: [{from: stem, to: trunk, forward: {clip: 1.0, noise: gaussian, noise_multiplier: 1.9}}]": (
        "clinic",
        "the cut stem -> trunk, forward: noise multiplier 1.9, where at least 2 is demanded",
    ),
    "cuts: [{from: stem, to: trunk, backward: {clip: 0.6}}]": (
        "server",
        "the cut stem -> trunk, backward: clip 0.6, where at most 0.5 is allowed",
    ),
    "labels: [{to: trunk, epsilon: 2.5}]": (
        "clinic",
        "the labels for trunk: epsilon 2.5 a label, where at most 2 is allowed",
    ),
    "labels: [{to: trunk, epsilon: 1.0, classes: 4}]": (
        "clinic",
        "the labels for trunk: 4 classes, where the floor has 3",
    ),
}


@pytest.mark.parametrize("line", UNDER)
def test_under_the_floor_it_is_refused(line: str, tmp_path: Path) -> None:
    party, sentence = UNDER[line]
    with pytest.raises(BelowFloor) as refused:
        demanded(own(tmp_path, line, party=party))
    assert refused.value.seen == f"{tmp_path / party}.yaml:6: {sentence}"
    assert refused.value.exit_code == 3
    assert refused.value.expected and refused.value.fix


def complaint(party_file: PartyFile, line: int) -> PartyFileError:
    """What is wrong with the file, which is said of ``line``."""
    with pytest.raises(PartyFileError) as wrong:
        demanded(party_file)
    assert (wrong.value.file, wrong.value.line) == (str(party_file.file), line)
    return wrong.value


def test_a_cut_that_is_not_this_partys(tmp_path: Path) -> None:
    wrong = complaint(
        own(tmp_path, "cuts:", f"  - {TO_TRUNK}forward: {GAUSSIAN}}}", "  - {from: stem, to: trnuk, backward: null}"), 8
    )
    assert wrong.seen == "`stem -> trnuk` is no cut that leaves or reaches this party"
    assert wrong.expected == "one of stem -> side, stem -> trunk"
    assert wrong.fix.startswith("did you mean `stem -> trunk`")
    assert wrong.exit_code == 2


def test_labels_that_do_not_leave_this_party(tmp_path: Path) -> None:
    wrong = complaint(own(tmp_path, "labels: [{to: trnk, epsilon: 1.0, classes: 3}]"), 6)
    assert (wrong.seen, wrong.fix) == ("no labels leave this party for `trnk`", "did you mean `trunk`?")
    wrong = complaint(own(tmp_path, "labels: [{to: trunk, epsilon: 1.0, classes: 3}]", party="server"), 6)
    assert wrong.expected == "no `labels`: none leave this party"
    stays = graph_of("stem clinic data\nhead clinic loss\ntrunk server loss", "stem head\nstem trunk",
                     "clinic head\nward trunk")  # fmt: skip
    file = own(tmp_path, "labels: [{to: head, epsilon: 1.0, classes: 3}]")
    with pytest.raises(PartyFileError, match="no labels leave this party for `head`"):
        demands_of(stays, file, make_plan(stays, "clinic"))


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["cuts:", f"  - {TO_TRUNK}forward: {GAUSSIAN}}}", f"  - {TO_TRUNK}backward: {{clip: 0.1}}}}"], 8),
        (["labels: ", "  - {to: trunk, epsilon: 0.5}", "  - {to: trunk, epsilon: 1.5}"], 8),
    ],
    ids=["cuts", "labels"],
)
def test_what_is_named_twice_is_refused(lines: list[str], line: int, tmp_path: Path) -> None:
    """One of the two would apply, and the other be forgotten: what leaves would have less noise than was written."""
    assert "twice" in complaint(own(tmp_path, *lines), line).seen


def test_labels_without_the_number_of_classes(tmp_path: Path) -> None:
    graph = FLOORS.replace(", privacy: {epsilon: 2.0, classes: 3}}", "}")
    with pytest.raises(PartyFileError, match="`labels` to `trunk` without `classes`") as wrong:
        demanded(own(tmp_path, "labels: [{to: trunk, epsilon: 1.0}]"), graph)
    assert wrong.value.line == 6
    file = own(tmp_path, "labels: [{to: trunk, epsilon: 1.0, classes: 7}]")
    assert policies(file, graph)["labels trunk"] == LabelPolicy(1.0, 7)


@pytest.mark.parametrize(
    ("graph", "line"),
    [
        (
            FLOORS.replace("shape: [4], dtype: float32}", "shape: [4], dtype: int64}"),
            "cuts: [{from: stem, to: side, forward: {clip: 1.0}}]",
        ),
        (FLOORS, "labels: [{to: side, epsilon: 1.0, classes: 3}]"),
    ],
    ids=["whole numbers", "doses"],
)
def test_own_policies_for_what_no_mechanism_can_treat(graph: str, line: str, tmp_path: Path) -> None:
    """As the graph's floors for the same; else the first message would fail when everybody is connected."""
    with pytest.raises(PartyFileError) as wrong:
        demanded(own(tmp_path, line), graph)
    assert wrong.value.line == 6


# --- budgets


def checked(party_file: PartyFile, graph: Graph) -> None:
    check_demands(party_file, demands_of(graph, party_file, make_plan(graph, party_file.party)))


def test_a_budget_where_something_carries_inputs_without_noise(tmp_path: Path) -> None:
    graph = parse_graph(FLOORS)
    with pytest.raises(PartyFileError) as wrong:
        checked(own(tmp_path, "epsilon: 5.0"), graph)
    assert wrong.value.line == 6
    assert wrong.value.seen == (
        "a budget for inputs, but the activation of stem -> side to server carries them without noise"
    )
    clipped = "cuts: [{from: stem, to: side, forward: {clip: 1.0}}]"
    with pytest.raises(PartyFileError, match="without noise"):
        checked(own(tmp_path, "epsilon: 5.0", clipped), graph)
    noised = "cuts: [{from: stem, to: side, forward: {clip: 1.0, noise: laplace, noise_multiplier: 1.0}}]"
    checked(own(tmp_path, "epsilon: 5.0", noised), graph)
    checked(own(tmp_path), graph)  # no budget, no complaint


def test_a_budget_where_something_carries_labels_without_noise(tmp_path: Path) -> None:
    with pytest.raises(PartyFileError, match="labels of clinic -> side to server carries them without noise") as wrong:
        checked(own(tmp_path, "epsilon: 5.0", "label_epsilon: 4.0", "cuts: [{from: stem, to: side, forward: "
                    "{clip: 1.0, noise: gaussian, noise_multiplier: 1.0}}]"), parse_graph(FLOORS))  # fmt: skip
    assert wrong.value.line == 7
    head, _ = HAND_MADE["a head with labels of its own: its gradient tells about them"]
    with pytest.raises(PartyFileError, match="the gradient of trunk -> head to server carries them without noise"):
        checked(own(tmp_path, "label_epsilon: 4.0", party="ward"), head)
    noised = "cuts: [{from: trunk, to: head, backward: {clip: 1.0, noise: gaussian, noise_multiplier: 1.0}}]"
    checked(own(tmp_path, "label_epsilon: 4.0", noised, party="ward"), head)


def test_a_budget_for_what_a_party_does_not_hold(tmp_path: Path) -> None:
    checked(own(tmp_path, "epsilon: 0.1", "label_epsilon: 0.1", party="server"), parse_graph(FLOORS))


# --- what the files may say

GRAPH_MISTAKES: dict[str, tuple[tuple[str, str], int, str]] = {
    "noise on whole numbers": (
        ("    dtype: float32\n", "    dtype: int64\n"),
        15,
        "carries int64, which can be neither clipped nor given noise",
    ),
    "noise on raw samples": (
        ("    dtype: float32\n", "    dtype: float32\n    raw: true\n"),
        15,
        "may carry raw samples, and has a safeguard",
    ),
    "classes of what is no class": (
        ("to: side, field: dose, shape: [1], dtype: float32}",
         "to: side, field: dose, shape: [1], dtype: float32, privacy: {epsilon: 1.0, classes: 2}}"),
        19,
        "are float32 [1], where `privacy` needs class numbers",
    ),
    "noise without a clip": (("clip: 1.5, noise: gaussian", "noise: gaussian"), 15, "a safeguard without `clip`"),
    "noise without its scale": ((", noise_multiplier: 2.0", ""), 15, "noise without `noise_multiplier`"),
    "a scale without noise": (("noise: gaussian, ", ""), 15, "noise_multiplier without `noise`"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPH_MISTAKES)
def test_mistakes_in_a_graphs_floors(name: str) -> None:
    (old, new), line, seen = GRAPH_MISTAKES[name]
    assert FLOORS.count(old) == 1
    with pytest.raises(GraphError) as wrong:
        parse_graph(FLOORS.replace(old, new))
    assert seen in wrong.value.seen
    assert wrong.value.line == line


@pytest.mark.parametrize(
    ("good", "lowest", "highest", "below", "above"),
    [
        ("clip: 1.5", "clip: 1.0e-15", "clip: 1.0e+15", "clip: 0.9e-15", "clip: 1.1e+15"),
        (
            "noise_multiplier: 2.0",
            "noise_multiplier: 0.001",
            "noise_multiplier: 1.0e+6",
            "noise_multiplier: 0.0009",
            "noise_multiplier: 1000001.0",
        ),
        ("epsilon: 2.0", "epsilon: 1.0e-5", "epsilon: 40.0", "epsilon: 0.9e-5", "epsilon: 40.1"),
        ("classes: 3", "classes: 2", "classes: 1048576", "classes: 1", "classes: 1048577"),
    ],
)
def test_ranges_in_a_graphs_floors(good: str, lowest: str, highest: str, below: str, above: str) -> None:
    assert FLOORS.count(good) == 1
    for allowed in (lowest, highest):
        policy = policies(PartyFile(party="clinic"), FLOORS.replace(good, allowed))
        assert policy != FLOOR
    for forbidden in (below, above, good.split(":")[0] + ": .nan"):
        with pytest.raises(GraphError):
            parse_graph(FLOORS.replace(good, forbidden))


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["epsilon: 0.0"], 6),
        (["label_epsilon: -1.0"], 6),
        (["leakage: {every: 0}"], 6),
        (["leakage: {limit: 1.5}"], 6),
        (["leakage: {limit: 0.0}"], 6),
        (["epsilon: 1.0", "cuts: [{from: stem, to: trunk, forward: {clip: 0.0}}]"], 7),
        (["labels: [{to: trunk, epsilon: 41.0, classes: 3}]"], 6),
        (["labels: [{to: trunk, epsilon: 1.0, classes: 1}]"], 6),
    ],
)
def test_ranges_in_a_partys_own_policy(lines: list[str], line: int, tmp_path: Path) -> None:
    with pytest.raises(PartyFileError) as wrong:
        own(tmp_path, *lines)
    assert wrong.value.line == line


@pytest.mark.parametrize("delta", ["0.0", "1.0", "-1.0e-5", ".nan"])
def test_delta_is_a_probability_that_leaves_something(delta: str, tmp_path: Path) -> None:
    file = tmp_path / "clinic.yaml"
    file.write_text(OWN.format(party="clinic").replace("1.0e-6", delta))
    with pytest.raises(PartyFileError) as wrong:
        load_party(file)
    assert wrong.value.line == 5
