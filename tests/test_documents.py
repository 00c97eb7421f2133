"""What README and docs/ show a user is what the engine takes: snippets load, linked files are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from engine.load import load

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REST = {"model": "model", "task": "text-classification", "data": "rows"}

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def snippets(text: str) -> list[str]:
    """Blocks of YAML, and mappings with a `type` in tables, as stages."""
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`(?:stages: )?(\{type: .*?\})`", text)
    return blocks + [f"stages: {each}" for each in inline]


@every_document
def test_snippets_are_recipes(document: Path, tmp_path: Path) -> None:
    for number, snippet in enumerate(snippets(document.read_text(encoding="utf-8"))):
        written = YAML(typ="safe").load(snippet)
        missing = {key: value for key, value in REST.items() if key not in written}
        path = tmp_path / f"{number}.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in missing.items()) + snippet, encoding="utf-8")
        assert load(path).recipe.stages


def test_there_are_snippets() -> None:
    assert sum(len(snippets(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) >= 4


@every_document
def test_linked_files_are_there(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (document.parent / target).exists(), target


@every_document
def test_commands_exist(document: Path) -> None:
    from engine.cli import app

    known = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    said = set(re.findall(r"^(?:frostline|`frostline) ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
    assert said <= known, said - known
