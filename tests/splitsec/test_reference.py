"""docs/graph-file.md is what the models say, and its examples are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitsec import graph, partyfile, reference
from splitsec.graph import parse_graph
from splitsec.partyfile import check_party, load_party

FILE = Path(__file__).resolve().parents[2] / "docs" / "graph-file.md"


def test_the_file_is_what_the_models_say() -> None:
    assert FILE.read_text(encoding="utf-8") == reference.markdown(), "run `python -m splitsec.reference`"


def test_the_examples_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", reference.markdown(), flags=re.DOTALL)
    assert len(blocks) == 2
    file = tmp_path / "clinic-a.yaml"
    file.write_text(blocks[1])
    check_party(parse_graph(blocks[0]), load_party(file))


@pytest.mark.parametrize("module", [graph, partyfile])
def test_every_key_of_every_model_is_there_with_a_description(module: object) -> None:
    text = reference.markdown()
    models = [one for one in vars(module).values() if isinstance(one, type) and hasattr(one, "model_fields")]
    models = [
        one for one in models if one.__module__ == getattr(module, "__name__", "") and not one.__name__.startswith("_")
    ]
    assert len(models) >= 4
    for model in models:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            assert re.search(
                rf"\| `{field.alias or name}` \| .*{re.escape(field.description[1:].replace('|', chr(92) + '|'))}", text
            )


def test_links_lead_to_headings() -> None:
    text = reference.markdown()
    anchors = {
        re.sub(r"[^a-z0-9_ -]", "", line.lower()).strip().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, flags=re.M)
    }
    linked = set(re.findall(r"\]\(#([^)]*)\)", text))
    assert linked
    assert linked <= anchors
