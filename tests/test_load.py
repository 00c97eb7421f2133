"""Loading recipes: YAML 1.2, limits, extends, overrides, places; and that only a `RecipeError` ever comes out."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import PlanError, Problem, RecipeError
from engine.grammar.names import KEYS
from engine.grammar.reading import read, resolve
from engine.grammar.schema import schema
from engine.grammar.source import clean
from engine.grammar.wording import unknown
from engine.load import Loaded, load, scan
from engine.recipe import Data, Model, OptimizerName, Recipe, Splits, Training
from engine.schedules import Gradual, StageEntry
from engine.schedules.base import SchedulerName

ROOT = Path(__file__).parent.parent
SMALLEST = "model: a/b\ntask: text-classification\ndata: c/d\n"
STAGED = (
    SMALLEST
    + """\
freeze: bert
stages:
  - {name: head, epochs: 1}
  - name: top
    unfreeze: ["@blocks[-4:]", pooler]
    epochs: 2
    learning_rate: {classifier: 5e-4, encoder.layer.3: 1e-4}
"""
)


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def loaded(folder: Path, text: str, *overrides: str) -> Loaded:
    return load(write(folder, text), overrides)


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load(path, overrides)
    source = error.value.source
    assert source is not None
    return source.render(error.value.problems)


# YAML


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        (".5", 0.5),
        ("5.", 5.0),
        ("+3", 3),
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("None", "None"),
        ("=", "="),
        ("1e", "1e"),
        ("e3", "e3"),
        (".", "."),
    ],
)
def test_yaml_1_2_spellings(written: str, value: Any):
    found = resolve(written)
    assert found == value
    assert type(found) is type(value)


def test_quotes_make_text():
    node, problems = read("a: '1'\nb: \"true\"\nc: |\n  2\nd: 'x'", "x")
    assert node is not None
    assert node.plain() == {"a": "1", "b": "true", "c": "2\n", "d": "x"}
    assert problems == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#" * 300_000, "larger than 256 KiB"),
        ("x-a: [" + "1," * 25_000 + "]", "more than 20,000 values"),
        ("x-a: " + "[" * 2000, "deeper than 32 levels"),
        ("x-a: " + "{a: " * 40 + "1" + "}" * 40, "deeper than 32 levels"),
        ("x-a: " + "a" * 20_000, "more than 16 KiB"),
        ("a" * 20_000 + ": 1", "more than 16 KiB"),
        (
            "".join(f"x-{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(30)),
            "20,000 values",
        ),
        ("".join(f"x-{i}: &a{i} {{a: {f'*a{i - 1}' if i else 'x'}}}\n" for i in range(40)), "deeper than 32 levels"),
        ("x-a: &a [*a]", "inside of what it stands for"),
        ("a: &x {b: 1}\nc: {<<: *x}", "merge keys"),
        ("? {a: b}\n: 1", "a key has to be text"),
        ('a: "\\UFFFFFFFF"', "can't be read as YAML"),
        ("a: b\n---\nc: d", "a second document"),
    ],
)
def test_bombs_are_refused_at_once(tmp_path: Path, text: str, words: str):
    path = write(tmp_path, text)
    start = time.process_time()
    assert words in refused(path)
    assert time.process_time() - start < 5.0  # 0.1 s here, but for the 25,000 values


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!env", "!!str", "!"])
def test_no_tag_is_taken(tmp_path: Path, tag: str):
    assert "is a tag" in refused(write(tmp_path, SMALLEST + f"seed: {tag} x\n"))


# extends


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path):
    write(tmp_path, "extends: _org.yaml\nfreeze: [a, b]\ntraining: {weight_decay: 0.1}\nbatch_size: 8\n", "_team.yaml")
    write(tmp_path, "training: {learning_rate: 1e-4, weight_decay: 0.3}\nseed: 7\nevaluation: f1\n", "_org.yaml")
    text = "extends: _team.yaml\nfreeze: [c]\nbatch_size: null\nevaluation: {eval_steps: 5}\n" + SMALLEST
    recipe = loaded(tmp_path, text).recipe
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-4, 0.1)
    assert recipe.freeze == ("c",)
    assert recipe.batch_size == Recipe.model_fields["batch_size"].default
    assert recipe.seed == 7
    assert (recipe.evaluation.metric, recipe.evaluation.eval_steps) == ("f1", 5)


def test_the_short_form_of_a_mapping_merges_and_replaces(tmp_path: Path):
    write(tmp_path, "model: {path: a/b, revision: main}\ntask: text-classification\ndata: c/d\n", "base.yaml")
    model = loaded(tmp_path, "extends: base.yaml\nmodel: {dtype: bfloat16}\n").recipe.model
    assert (model.path, model.revision, model.dtype) == ("a/b", "main", "bfloat16")
    model = loaded(tmp_path, "extends: base.yaml\nmodel: e/f\n").recipe.model
    assert (model.path, model.revision) == ("e/f", None)


def test_a_mapping_of_another_type_replaces(tmp_path: Path):
    write(tmp_path, SMALLEST + "stages: {type: gradual, blocks_per_stage: 4, epochs: 1}\n", "base.yaml")
    text = "extends: base.yaml\nstages: {type: lp_ft, head_epochs: 2, steps: 5}\n"
    assert loaded(tmp_path, text).source.resolved["stages"] == {"type": "lp_ft", "head_epochs": 2, "steps": 5}
    assert loaded(tmp_path, "extends: base.yaml\nstages: {epochs: 3}\n").source.resolved["stages"] == {
        "type": "gradual",
        "blocks_per_stage": 4,
        "epochs": 3,
    }


def test_anchors_at_x_keys(tmp_path: Path):
    text = SMALLEST + "x-low: &low 1e-5\ntraining: {learning_rate: *low}\n"
    result = loaded(tmp_path, text)
    assert result.recipe.training.learning_rate == 1e-5
    assert "x-low" not in result.source.resolved


def test_the_place_of_a_key_is_the_file_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "training:\n  learning_rate: 1e-4\n", "parts/_team.yaml")
    write(tmp_path, "extends: parts/_team.yaml\n" + SMALLEST + "training: {weight_decay: 0.1}\n")
    source = load("recipe.yaml", ["seed=1"]).source
    assert source.place(("training", "learning_rate")) == "parts/_team.yaml:2:3"
    assert source.place(("training", "weight_decay")) == "recipe.yaml:5:12"
    assert source.place(("model",)) == "recipe.yaml:2:1"
    assert source.place(("seed",)) == "command line"
    assert source.place(("evaluation", "metric")) == "recipe.yaml:1:1"


def test_extends_stays_inside_the_tree(tmp_path: Path):
    outside = write(tmp_path, SMALLEST, "outside.yaml")
    inside = tmp_path / "project" / "recipes"
    spellings = [
        "../outside.yaml",
        "../../outside.yaml",
        str(outside),
        "x/../../../outside.yaml",
        "/etc/passwd",
        "link",
    ]
    inside.mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    for spelling in [*spellings, "a\\0b"]:
        told = refused(write(inside, f'extends: "{spelling}"\n' + SMALLEST))
        assert re.search("lies outside|can't be read|there is no file", told), spelling
        assert "recipe.yaml:1:1  extends: " in told


def test_a_repository_is_one_tree(tmp_path: Path):
    (tmp_path / ".git").mkdir()
    write(tmp_path, "seed: 9\n", "shared/_team.yaml")
    path = write(tmp_path, "extends: ../shared/_team.yaml\n" + SMALLEST, "recipes/a.yaml")
    assert load(path).recipe.seed == 9


def test_extends_ends(tmp_path: Path):
    for number in range(12):
        write(tmp_path, f"extends: {number + 1}.yaml\nseed: {number}\n", f"{number}.yaml")
    assert "too long to follow" in refused(tmp_path / "0.yaml")
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "in a circle" in refused(tmp_path / "a.yaml")


def test_files_together_are_small(tmp_path: Path):
    for number in range(5):
        write(tmp_path, f"extends: {number + 1}.yaml\n#{'x' * 240_000}\n", f"{number}.yaml")
    write(tmp_path, SMALLEST, "5.yaml")
    assert "larger than 1024 KiB together" in refused(tmp_path / "0.yaml")


def test_files_that_are_none(tmp_path: Path):
    write(tmp_path, SMALLEST, "intent.yaml")
    assert "did you mean `intent.yaml`?" in refused(tmp_path / "intnet.yaml")
    assert "is a folder" in refused(tmp_path)
    assert "there is no such file" in refused(Path("/dev/zero"))
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    for path in (tmp_path / "loop.yaml", tmp_path / ("a" * 300), Path("a\0b")):
        assert refused(path)


def test_a_part_is_held_to_the_rules_of_yaml_alone(tmp_path: Path):
    scan(write(tmp_path, "batch_size: 8\n", "_part.yaml"))
    with pytest.raises(RecipeError):
        scan(write(tmp_path, "batch_size: 8\nbatch_size: 9\n", "_part.yaml"))


# overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("stages.top.epochs=5", ("stages", 1, "epochs"), 5),
        ("stages[top].epochs=5", ("stages", 1, "epochs"), 5),
        ("stages.1.epochs=5", ("stages", 1, "epochs"), 5),
        ("stages[1].unfreeze[0]=pooler", ("stages", 1, "unfreeze", 0), "pooler"),
        ("stages.top.unfreeze=@blocks[-2:]", ("stages", 1, "unfreeze"), "@blocks[-2:]"),
        ("stages.top.learning_rate=1e-3", ("stages", 1, "learning_rate"), 0.001),
        ("stages.top.learning_rate.encoder.layer.3=1e-3", ("stages", 1, "learning_rate", "encoder.layer.3"), 0.001),
        ("training.weight_decay=0.1", ("training", "weight_decay"), 0.1),
        ("training={weight_decay: 0.1}", ("training", "weight_decay"), 0.1),
        ("evaluation.metric=f1", ("evaluation", "metric"), "f1"),
        ("model.revision=main", ("model", "revision"), "main"),
        ("model.revision=main", ("model", "path"), "a/b"),
        ("task.max_length=7", ("task", "max_length"), 7),
        ("freeze=[x, y]", ("freeze",), ["x", "y"]),
        ("data=e/f", ("data",), "e/f"),
        ("data.path=a=b", ("data", "path"), "a=b"),
        ("stages={type: gradual, epochs: 1}", ("stages", "type"), "gradual"),
    ],
)
def test_overrides(tmp_path: Path, override: str, path: tuple[str | int, ...], value: Any):
    found: Any = loaded(tmp_path, STAGED, override).source.resolved
    for step in path:
        found = found[step]
    assert found == value


def test_an_override_with_nothing_removes(tmp_path: Path):
    result = loaded(tmp_path, STAGED, "stages.head=null", "freeze=", "stages.top.learning_rate=null")
    assert "freeze" not in result.source.resolved
    assert [stage["name"] for stage in result.source.resolved["stages"]] == ["top"]
    assert "learning_rate" not in result.source.resolved["stages"][0]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "command line  `seed` is no override; write `key.path=value`"),
        ("=3", "command line  `=3` is no override; write `key.path=value`"),
        ("seed=x", "command line  seed: needs a whole number, not the text `x`"),
        ("sed=1", "command line  sed: no such key; did you mean `seed`?"),
        ("stages.tpo.epochs=1", "`stages.tpo.epochs=1`: the list has no item `tpo`; did you mean `top`?"),
        ("stages.7.epochs=1", "the list has no item `7`; it has 2, by index or name: head, top"),
        ("stages.top.lr=1", "command line  stages[top].lr: no such key; did you mean `learning_rate`?"),
        ("freeze=[a", "command line  `freeze=[a` a list that opens with `[` isn't closed"),
        ("freeze=!!python/name:os.system x", "is a tag"),
        ("freeze=layer.[0-11]", "command line  freeze: `layer.[0-11]` holds `[0-11]`, a set of single characters"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, told: str):
    assert told in refused(write(tmp_path, STAGED), override)


# places, labels, rendering


def test_labels_name_stages(tmp_path: Path):
    source = loaded(tmp_path, STAGED).source
    assert source.label(("stages", 1, "unfreeze", 0)) == "stages[top].unfreeze[0]"
    assert source.label(("stages", 0, "learning_rate")) == "stages[head].learning_rate"
    assert (
        source.label(("stages", 1, "learning_rate", "encoder.layer.3")) == "stages[top].learning_rate[encoder.layer.3]"
    )
    assert source.label(("freeze", 0)) == "freeze"  # written without a list
    assert source.label(("data", "path")) == "data"  # written in its short form
    assert source.label(("evaluation", "metric")) == "evaluation.metric"  # not written at all
    assert source.label(()) == ""
    assert source.place(("stages", 1, "unfreeze", 1)).endswith("recipe.yaml:8:32")
    assert source.place(("freeze", 0)).endswith("recipe.yaml:4:9")


def test_render_orders_by_place_and_takes_any_problem(tmp_path: Path):
    source = loaded(tmp_path, STAGED).source
    problems = [Problem(("stages", 1), "late"), Problem(("freeze", 0), "early", "do it"), Problem((), "whole")]
    lines = source.render(PlanError(problems, source).problems).splitlines()
    assert [line.split("recipe.yaml")[1] for line in lines] == [
        ":1:1  whole",
        ":4:9  freeze: early; do it",
        ":7:5  stages[top]: late",
    ]


def test_nothing_printed_can_drive_a_terminal(tmp_path: Path):
    hostile = "\x1b]0;title\x07\u202eevil\u2066\x9b31m\r\nnext"
    assert clean(hostile) == "]0;titleevil31m next"
    assert clean("a\u05ebb\ue000c\U00011500d\u2000e\xa0f") == "abcd e f"  # no characters, for some, and odd spaces
    told = refused(write(tmp_path, SMALLEST + '"\\e]0;pwned\\a\\u202e": 1\n'))
    assert told.isprintable()


def test_all_problems_at_once(tmp_path: Path):
    told = refused(
        write(tmp_path, "task: x\nseed: y\nseed: 3\nfreeze: layer.[0-11]\nstages: [{name: a}]\ntraning: {}\n")
    )
    for words in (
        "model: is missing",
        "task: ",
        "written twice",
        "freeze: ",
        "stages[a]: ",
        "did you mean `training`?",
    ):
        assert words in told


# names and schema


@pytest.mark.parametrize("name", KEYS)
def test_every_name_of_other_tools_leads_to_a_key(name: str):
    told = [unknown(name, [part]) for part in (Recipe, Model, Data, Splits, Training, StageEntry, Gradual)]
    assert any(KEYS[name].split(".")[-1] in words for words in told)


def test_names_of_schedulers_and_optimizers_are_those_of_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(SchedulerName.__args__) < {name.value for name in SchedulerType}
    assert set(OptimizerName.__args__) < {name.value for name in OptimizerNames}
    assert StageEntry.model_fields["lr_scheduler_type"].annotation == SchedulerName | None


def test_the_schema_is_the_one_in_the_recipes_folder():
    pinned = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert pinned == schema(), "the keys of a recipe changed: `frostline schema > recipes/recipe.schema.json`"


@pytest.mark.parametrize(
    "text",
    [
        SMALLEST,
        STAGED,
        SMALLEST + "extends: x\nx-a: [1]\ntraining: null\n",
        "extends: x\ndata: {name: plus, columns: {label: null}}\nstages: {epochs: 2}\ntask: {max_length: 3}\n",
        SMALLEST + "stages: {type: gradual, blocks_per_stage: 2, steps: 1}\nevaluation: f1\n",
        SMALLEST + "adapters: [{type: lora, target_modules: q, r: 8}]\nevaluation: {metrics: [f1, accuracy]}\n",
        "model: {path: a/b}\ntask: {type: text-classification}\ndata: {path: a, data_files: {train: [a, b]}}\n",
        *(path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))),
    ],
)
def test_the_schema_takes_what_loading_takes(text: str):
    node, _ = read(text, "x")
    assert node is not None
    assert fits(node.plain(), schema(), schema()["$defs"])


@pytest.mark.parametrize(
    "text",
    [
        "seed: x",
        "unfreez: a",
        "stages: [{nam: a}]",
        "training: {lr: 1}",
        "task: nonsense",
        "cache: maybe",
        "batch_size: 0",
    ],
)
def test_the_schema_refuses_what_it_can(text: str):
    node, _ = read(text, "x")
    assert node is not None
    assert not fits(node.plain(), schema(), schema()["$defs"])


KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, part: Any, definitions: Any) -> bool:
    """JSON Schema, as much of it as ours says."""
    known = {
        "$ref",
        "anyOf",
        "oneOf",
        "type",
        "enum",
        "const",
        "items",
        "properties",
        "additionalProperties",
        "required",
    }
    known |= {"patternProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "pattern"}
    assert part is True or set(part) <= known | {"title", "description", "default", "$defs", "$schema"}
    if part is True:
        return True
    inner = definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else True
    branches = part.get("anyOf", [True])
    return (
        fits(value, inner, definitions)
        and any(fits(value, branch, definitions) for branch in branches)
        and ("oneOf" not in part or sum(fits(value, branch, definitions) for branch in part["oneOf"]) == 1)
        and _fits_kind(value, part)
        and _fits_inside(value, part, definitions)
    )


def _fits_kind(value: Any, part: dict[str, Any]) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = part.get("type")
    right = kind is None or (number if kind in ("number", "integer") else isinstance(value, KINDS[kind]))
    return (
        right
        and value in part.get("enum", [value])
        and value == part.get("const", value)
        and not (number and value < part.get("minimum", value))
        and not (number and value <= part.get("exclusiveMinimum", value - 1))
        and not (number and value >= part.get("exclusiveMaximum", value + 1))
        and not (isinstance(value, str) and "pattern" in part and not re.search(part["pattern"], value))
    )


def _fits_inside(value: Any, part: dict[str, Any], definitions: Any) -> bool:
    if isinstance(value, list):
        return len(value) >= part.get("minItems", 0) and all(
            fits(v, part.get("items", True), definitions) for v in value
        )
    if not isinstance(value, dict):
        return True
    if not set(part.get("required", ())) <= set(value):
        return False
    for key, item in value.items():
        named = [part["properties"][key]] if key in part.get("properties", {}) else []
        named += [inner for pattern, inner in part.get("patternProperties", {}).items() if re.search(pattern, key)]
        inner = named[0] if named else part.get("additionalProperties", True)
        if inner is False or not fits(item, inner, definitions):
            return False
    return True


# hostile text

CORPUS = [path.read_bytes() for path in sorted((ROOT / "tests" / "golden").glob("*.yaml"))] + [STAGED.encode()]
BITS = [b"&a ", b"*a", b"!!x ", b"{", b"}", b"[", b"]", b": ", b"- ", b"\n", b"  ", b'"', b"'", b"|\n", b">-\n", b"#"]
BITS += [b"%", b"@", b"\t", b"---\n", b"...\n", b"\xff", b"\x00", b"<<: ", b"1e999", b"?  ", b"\xe2\x80\xa8", b"\r"]
BITS += [
    b"extends: .\n",
    b"\\u12",
    b'"\\UFFFFFFFF"',
    b"%TAG ! x\n---\n",
    b"|9\n",
    b"\xef\xbb\xbf",
    b"9" * 50,
    b"@blocks[",
]
CUTS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(BITS) | st.binary(max_size=4), st.integers(0, 9)), max_size=6
)


@given(text=st.sampled_from(CORPUS) | st.binary(max_size=80), cuts=CUTS)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_nothing_but_a_recipe_error_comes_out(tmp_path: Path, text: bytes, cuts: list[tuple[float, bytes, int]]):
    for share, bit, length in cuts:
        at = int(share * len(text))
        text = text[:at] + bit + text[at + length :]
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(text)
    told = attempt(path)
    assert len(told) <= 20
    assert all(line.isprintable() for line in told)


def attempt(path: Path) -> list[str]:
    """What a user is told of a recipe, line by line; nothing where it is right."""
    try:
        load(path)
    except RecipeError as error:
        return error.source.render(error.problems).splitlines() if error.source else []
    return []
