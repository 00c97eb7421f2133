"""The one meaning of a pattern as a truth table, what can't be one, what is near, and that hostile ones end."""

from __future__ import annotations

import contextlib
import time

import pytest

from engine.outline import Module, Outline, Parameter
from engine.patterns import lint, moved, nearest, select


def outline(*parameters: str, kinds: dict[str, str] | None = None, aliases: dict[str, str] | None = None) -> Outline:
    """An outline from parameter names alone; every module around them exists."""
    names: dict[str, None] = {}
    for parameter in parameters:
        parts = parameter.split(".")[:-1]
        names.update(dict.fromkeys(".".join(parts[: end + 1]) for end in range(len(parts))))
    return Outline(
        architecture="Test",
        modules=tuple(Module(name, (kinds or {}).get(name.split(".")[-1], "Linear")) for name in names),
        parameters=tuple(
            Parameter(name, name.rpartition(".")[0], (2,), None, tuple(filter(None, [(aliases or {}).get(name)])))
            for name in parameters
        ),
        blocks=tuple(name for name in names if name.split(".")[-1].isdigit()),
        head=("classifier",),
        embeddings=("bert.embeddings",),
    )


def bert(blocks: int = 12) -> Outline:
    inner = ("attention.query.weight", "attention.query.bias", "attention.value.weight", "output.LayerNorm.bias")
    parameters = [f"bert.encoder.layer.{block}.{name}" for block in range(blocks) for name in inner]
    words = "bert.embeddings.word_embeddings.weight"
    return outline(words, *parameters, "classifier.weight", "classifier.bias", kinds={"LayerNorm": "LayerNorm"})


VIT = outline("vit.embeddings.proj.weight", *(f"vit.layers.{i}.attention.q_proj.weight" for i in range(12)))
LAYER = "bert.encoder.layer.1"


@pytest.mark.parametrize(
    ("pattern", "name", "taken"),
    [
        ("bert", "bert", True),
        ("bert", "bert.encoder.layer.1", False),  # it comes along as a child, without being named
        ("layer.1", LAYER, True),
        ("layer.1", "bert.encoder.layer.11", False),
        ("layer.1", "bert.encoder.layer.10", False),
        ("ayer.1", LAYER, False),
        ("1", LAYER, True),
        ("1", "bert.encoder.layer.11", False),
        (r"encoder\.layer\.1", LAYER, True),
        ("encoder.layer", "bert.encoder.layer", True),
        ("^encoder.layer", "bert.encoder.layer", False),
        ("^bert.encoder.layer", "bert.encoder.layer", True),
        ("encoder.layer$", "bert.encoder.layer", True),
        ("layer.(1|2)", LAYER, True),
        ("layer.[0-3]", LAYER, True),
        (r"layer.\d+", "bert.encoder.layer.11", True),
        (r"layer.\d", "bert.encoder.layer.11", False),
        ("query|value", f"{LAYER}.attention.query", True),
        ("query|value", f"{LAYER}.attention.value", True),
        ("query|value", f"{LAYER}.attention", False),
        ("que", f"{LAYER}.attention.query", False),
        (".*query", f"{LAYER}.attention.query", True),
        ("bert.*query", f"{LAYER}.attention.query", True),
        ("(?i)layernorm", f"{LAYER}.output.LayerNorm", True),
        ("layernorm", f"{LAYER}.output.LayerNorm", False),
        ("(?!.*attention)layer.1.*", f"{LAYER}.output", True),
        ("(?!.*attention)layer.1.*", f"{LAYER}.attention.query", False),
        ("@head", "classifier", True),
        ("@head", "bert", False),
        ("@embeddings", "bert.embeddings", True),
        ("@blocks", LAYER, True),
        ("@blocks[1]", LAYER, True),
        ("@blocks[-1]", "bert.encoder.layer.11", True),
        ("@blocks[-1]", LAYER, False),
        ("@blocks[-4:]", "bert.encoder.layer.8", True),
        ("@blocks[-4:]", "bert.encoder.layer.7", False),
        ("@blocks[:2]", LAYER, True),
        ("@blocks[::2]", LAYER, False),
        ("@blocks[ 1 : 3 ]", LAYER, True),
        ("@norms", f"{LAYER}.output.LayerNorm", True),
        ("@norms", f"{LAYER}.attention", False),
    ],
)
def test_truth_table(pattern: str, name: str, taken: bool):
    assert (name in select(pattern, bert()).modules) is taken


def test_children_come_along():
    parameters = select("layer.1", bert()).parameters
    assert parameters == {p.name for p in bert().parameters if p.name.startswith("bert.encoder.layer.1.")}


def test_biases_are_parameters_and_nothing_else():
    selection = select("@biases", bert(2))
    assert selection.modules == ()
    assert len(selection.parameters) == 5
    assert all(name.endswith(".bias") for name in selection.parameters)


def test_adapters_belong_to_the_module_they_adapt():
    own = Parameter("a.b.weight", "a.b", (2,))
    adapter = Parameter("peft.whatever.lora_A.default.weight", "a.b", (2,), adapter="lora")
    model = Outline("Test", (Module("a", "A"), Module("a.b", "Linear")), (own, adapter))
    assert select("b", model).parameters == {own.name, adapter.name}


def test_a_tied_tensor_is_taken_by_the_name_that_is_reached():
    tied = outline("embed.weight", "other.weight", "head.bias", aliases={"embed.weight": "head.weight"})
    assert select("head", tied).parameters == {"head.weight", "head.bias"}
    assert select("embed", tied).parameters == {"embed.weight"}


def test_a_pattern_that_names_nothing_is_empty():
    assert select("nothing", bert()) == select("nowhere", bert())
    assert not select("nothing", bert()).modules


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("", "is empty"),
        ("a" * 513, "513 characters long"),
        ("layer.(1|2", "is no regular expression: missing ) at position 11"),
        ("*.query", "`.*` stands for anything"),
        ("layer.[0-11]", "not the numbers 0 to 11"),
        ("layer.{0,11}", "repeats the dot and counts no layers"),
        (r"layer\.{0,11}", "`(0|1|...|11)`, or `@blocks[0:12]`"),
        (".query", "leave the dot out"),
        ("layer.1.", "leave the dot out"),
        ("@bloks[-1]", "did you mean `@blocks`?"),
        ("@blocks[-4", "something behind it"),
        ("@blocks[-4:].attention", "something behind it"),
        ("@blocks[x]", "no index that Python would take"),
        ("@blocks[::0]", "no index that Python would take"),
        ("@head[1]", "takes no index"),
        ("@", "there are @head"),
        ("@: head", "there are @head"),
        ("a\nb", "can't be printed"),
        ("((a{1000}){1000}){1000}", "repeats too often"),
        ("a{99999999999999999999}", "repeats too often"),
        ("(?R)", "no place in a pattern"),
        ("(?:query){e<=2}", "no place in a pattern"),
    ],
)
def test_what_cannot_be_a_pattern(pattern: str, words: str):
    assert words in (lint(pattern) or "")
    with pytest.raises(ValueError, match=r"is |holds |has |takes |repeats |starts |ends "):
        select(pattern, bert())


@pytest.mark.parametrize(
    "pattern", ["layer.[0-9]", "query|value", r"layer\.\d{1,2}", ".*norm", "@blocks[-4:]", r"\p{L}+"]
)
def test_what_can_be_a_pattern(pattern: str):
    assert lint(pattern) is None


def test_blocks_that_are_not_there():
    with pytest.raises(ValueError, match="this model has 12 blocks, 0 to 11"):
        select("@blocks[12]", bert())
    with pytest.raises(ValueError, match="no stack of repeated blocks"):
        select("@blocks", outline("fc.weight"))


def test_nearest_are_patterns_that_match():
    for pattern in ("quer", "bert.encoder.layers.3", r"encoder\.layr\.\d+", "clasifier", "quer|valu"):
        near = nearest(pattern, bert())
        assert near, pattern
        assert all(select(name, bert()).modules for name in near)
    assert nearest("quer", bert())[0] == "query"
    assert "vit.layers.11" in nearest("vit.encoder.layer.(8|9|10|11)", VIT)
    assert nearest("zzzzzzzz", bert()) == ()


@pytest.mark.parametrize(
    ("pattern", "write"),
    [
        ("vit.encoder.layer.(8|9)", "vit.layers.(8|9)"),
        (r"vit\.encoder\.layer\.3", "vit.layers.3"),
        ("encoder.layer.0.attention.attention.query", "layers.0.attention.q_proj"),
        ("query", "q_proj"),
    ],
)
def test_moved_between_transformers_4_and_5(pattern: str, write: str):
    assert not select(pattern, VIT).modules
    assert select(write, VIT).modules
    assert f"; write `{write}`" in (moved(pattern, VIT) or "")


def test_moved_says_nothing_where_no_rename_helps():
    assert moved("querry", VIT) is None
    assert moved("@head", VIT) is None


def test_moved_tells_parameters_from_modules():
    assert moved("classifier.weight", bert()) == (
        "`classifier.weight` names a parameter; patterns name modules, such as `classifier`"
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|aa)+$",
        r"(\w+\.?)+bias_",
        r"(\w*\.?)*(\w*\.?)*(\w*\.?)*x!",
        r"(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6!",
        r"(?:(?:a?){0,31}){0,31}b",
        r"(?<=(\w+)+)!",
        "(" * 200 + ")" * 200,
    ],
)
def test_hostile_patterns_end(pattern: str):
    model = outline(*(f"{'a' * 30}.{i}.{'b' * 30}.{'a' * 40}.weight" for i in range(250)))
    start = time.monotonic()
    with contextlib.suppress(ValueError):
        select(pattern, model)
    assert time.monotonic() - start < 15  # the deadline is 2 s, kept coarsely, and the machine may be busy


def test_the_deadline_is_for_the_whole_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.patterns.PATIENCE", 0.0)
    with pytest.raises(ValueError, match="takes too long to match"):
        select("bert", bert())
