"""``splitsec check``: is the graph right, do the party files fit, and what does it look like?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitsec.graph import Graph
    from splitsec.partyfile import Folder

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Check FOLDER/graph.yaml and FOLDER/parties/*.yaml against each other, and the modules and data that they name against
the shapes that the graph declares; then draw the graph.  Nothing is started, nothing is sent.

  splitsec check examples/vanilla
  splitsec check examples/u-shaped --svg u-shaped.svg
  splitsec check examples/vertical --no-models     only the files: none of the parties' own code runs
  splitsec check graph.yaml --party parties/clinic-a.yaml     at one site, which has no other party's file
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "check",
        help="validate a folder and draw its graph",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder with graph.yaml and parties/, or a graph file alone")
    parser.add_argument("--party", metavar="FILE", help="with a graph file: one party's file to check against it")
    parser.add_argument("--svg", metavar="FILE", help="write the picture to FILE, too; - for standard output alone")
    parser.add_argument("--json", action="store_true", help="print what was found as one JSON document")
    parser.add_argument(
        "--no-models",
        action="store_true",
        help="check the files only: build no modules, read no data, run no user code",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check and draw; any mistake is raised before anything is written."""
    from splitsec.contract import digest
    from splitsec.graph import load_graph
    from splitsec.partyfile import Folder, check_party, load_folder, load_party

    place = Path(arguments.folder)
    # A site has the graph file and its own party file, not the others'.
    folder = Folder(place.parent, load_graph(place), {}) if place.is_file() else load_folder(place)
    if arguments.party is not None:
        party = load_party(arguments.party)
        check_party(folder.graph, party)
        folder = Folder(folder.path, folder.graph, {party.party: party})
    if not arguments.no_models:
        from splitsec.probe import probe
        from splitsec.process import leave_the_compiler_out

        leave_the_compiler_out()
        probe(folder)
    safeguards = _safeguards(folder)
    if arguments.svg == "-":
        from splitsec.drawing import svg

        sys.stdout.write(svg(folder.graph))
        return 0
    if arguments.svg is not None:
        _write_svg(folder, Path(arguments.svg))
    if arguments.json:
        import json

        print(json.dumps({**_as_json(folder), "safeguards": safeguards}, indent=2))
    else:
        from splitsec.drawing import draw

        sys.stdout.write(draw(folder.graph, ascii_only=not _draws_boxes(sys.stdout.encoding)))
        if any(one["policy"] for one in safeguards):
            print("\nwhat is done before it leaves")
            for one in safeguards:
                print(f"  {one['party']} to {one['to']}, {one['kind']} of {one['of']}: {one['policy'] or 'as it is'}")
        for warning in _warnings(folder.graph):
            print(f"\nwarning: {warning}")
        print(f"\ndigest {digest(folder.graph).hex()[:16]}  (every party must have the same)")
    return 0


def _safeguards(folder: Folder) -> list[dict[str, Any]]:
    """What each party does to what it sends in a step, and which of its own data that carries."""
    from splitsec.demands import check_demands, demands_of, learnt_from
    from splitsec.plan import make_plan

    found: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for name, party_file in folder.parties.items():
        plan = make_plan(folder.graph, name)
        demands = demands_of(folder.graph, party_file, plan)
        check_demands(party_file, demands)
        for demand in demands.values():
            lane = demand.lane
            found[name, lane.peer, lane.kind, lane.name] = {
                "party": name,
                "to": lane.peer,
                "kind": lane.kind,
                "of": lane.name,
                "carries": sorted(demand.carries),
                "policy": None if demand.policy is None else str(demand.policy),
            }
        for lane in plan.lanes_out.values():
            if lane.kind == "weights":
                private = party_file.segments[lane.name].dp_sgd
                found[name, lane.peer, lane.kind, lane.name] = {
                    "party": name,
                    "to": lane.peer,
                    "kind": lane.kind,
                    "of": lane.name,
                    "carries": sorted(learnt_from(plan).get(lane.name, ())),
                    "policy": None
                    if private is None
                    else f"dp_sgd: clip {private.clip:g}, gaussian {private.noise_multiplier:g}",
                }
    return list(found.values())


def _warnings(graph: Graph) -> list[str]:
    """What keeps every rule, and yet tells more than whoever wrote it may think."""
    found: dict[str, None] = {}
    for circuit in graph.circuits_between():
        hidden = circuit.second in graph.far_ends and circuit.first in graph.members(graph.anonymous or "")
        for route in circuit.routes if hidden else ():
            if len(route) == 1:
                found[
                    f"{route[0]} alone stands between {graph.anonymous} and {circuit.second}: it knows both ends, and "
                    f"so which member speaks to {circuit.second}. Two relays of two institutions know it only together"
                ] = None
    if graph.circuits.cover is not None and graph.circuits.padding == "padme":
        found[
            "`cover` with `padding: padme`: cells go at a constant pace, but their sizes tell those that carry much "
            "from the others. `padding: fixed` hides that, too"
        ] = None
    return list(found)


def _write_svg(folder: Folder, file: Path) -> None:
    from splitsec.drawing import svg
    from splitsec.errors import UserError

    try:
        file.write_text(svg(folder.graph), encoding="utf-8")
    except OSError as reason:
        raise UserError(
            f"{file} cannot be written: {reason.strerror}",
            expected="a file that you may write",
            fix="choose another --svg",
        ) from None


def _draws_boxes(encoding: str | None) -> bool:
    try:
        "┌─▶".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _as_json(folder: Folder) -> dict[str, Any]:
    from splitsec.contract import digest
    from splitsec.plan import relays_needed

    graph = folder.graph
    return {
        "graph": graph.name,
        "digest": digest(graph).hex(),
        "parties": list(graph.parties),
        "party_files": list(folder.parties),
        "streams": graph.streams,
        "schedule": graph.schedule,
        "segments": list(graph.order),
        "cuts": [
            {
                "from": cut.source,
                "to": cut.target,
                "shape": list(cut.shape),
                "dtype": cut.dtype,
                "codec": cut.codec,
            }
            for cut in graph.cuts
        ],
        "labels": [{"from": one.source, "to": one.target, "field": one.field} for one in graph.labels],
        "links": [{"dialer": one.dialer, "listener": one.listener} for one in graph.links()],
        "circuits": [
            {"from": one.first, "to": one.second, "routes": [list(route) for route in one.routes]}
            for one in graph.circuits_between()
        ],
        "relays": [name for name in graph.parties if name in graph.relays],
        "relays_only": [name for name in graph.parties if name in relays_needed(graph)],
        "anonymous": None
        if graph.anonymous is None
        else {
            "group": graph.anonymous,
            "far_ends": [name for name in graph.parties if name in graph.far_ends],
            "pseudonym": graph.groups[graph.anonymous].pseudonym,
        },
        "warnings": _warnings(graph),
    }
