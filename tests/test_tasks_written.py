"""Summarization and translation: what is read and written, what is refused, and that writing is judged in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import running
import tiny
import torch
import transformers
from running import stage

from engine.errors import PlanError
from engine.records import Evaluated, StageStarted
from engine.tasks import Facts
from engine.tasks.summarization import Summarization
from engine.tasks.texts import IGNORED
from engine.tasks.translation import Translation

KINDS = ["good", "bad", "dull", "great", "fun"]
SEQ2SEQ = ("text", "summary")


def summarization(**keys: Any) -> Summarization:
    return Summarization.model_validate({"type": "summarization", **keys})


def translation(**keys: Any) -> Translation:
    return Translation.model_validate({"type": "translation", **keys})


def rows(count: int, names: tuple[str, str] = SEQ2SEQ) -> list[dict[str, str]]:
    """Texts with the one word that counts, which is what is to be written."""
    kinds = [KINDS[at % 5] for at in range(count)]
    return [{names[0]: f"the film is {kind}" + ", very" * (at % 3), names[1]: kind} for at, kind in enumerate(kinds)]


def place(root: Path, train: Any, validation: Any) -> Path:
    running.place(root, tiny.t5(), train, validation)
    tiny.byte_level().save_pretrained(root / "model")
    return root


# What goes in


def test_rows_become_what_is_read_and_what_is_written() -> None:
    tokenizer, task = tiny.byte_level(), summarization(source_prefix="sum: ", max_source_length=12, max_target_length=2)
    data = {"text": ["the film", "the film is good, very good, very very good"], "summary": ["good", "not good, dull"]}
    columns = task.encode(data, tokenizer, Facts())
    assert columns["truncated"] == [False, True]
    assert tokenizer.decode(columns["input_ids"][0]).startswith("sum: the film")
    assert [len(ids) for ids in columns["input_ids"]][1] == 12
    assert [len(ids) for ids in columns["labels"]][1] == 2
    columns.pop("truncated")
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    batch = task.collate(tokenizer)(examples)
    assert task.weight(batch) == sum(len(ids) for ids in columns["labels"])
    assert (batch["labels"] == IGNORED).sum() == batch["labels"].numel() - task.weight(batch)
    model = tiny.t5().eval()
    loss = model(**task.inputs(batch)).loss.detach()
    alone = [model(**task.inputs(task.collate(tokenizer)([example]))).loss.detach() for example in examples]
    weights = [len(example["labels"]) for example in examples]
    mean = sum(float(part) * weight for part, weight in zip(alone, weights, strict=True)) / sum(weights)
    assert float(loss) == pytest.approx(mean, rel=1e-5)


def test_a_text_longer_than_the_model_is_refused() -> None:
    with pytest.raises(PlanError, match="the model reads 64 tokens at most, not 65; write 64"):
        summarization(max_source_length=65).encode({"text": ["a"], "summary": ["b"]}, tiny.byte_level(), Facts())


def test_a_model_of_many_languages_is_refused() -> None:
    tokenizer = tiny.byte_level()
    tokenizer.src_lang = "en_XX"
    with pytest.raises(PlanError, match="knows its languages by tokens"):
        translation().encode({"source": ["a"], "target": ["b"]}, tokenizer, Facts())


def test_translations_are_columns_or_mappings(tmp_path: Path) -> None:
    pairs = [{"translation": {"en": row["text"], "ro": row["summary"]}} for row in rows(12)]
    place(tmp_path, pairs, pairs[:4])
    kind = {"type": "translation", "source_lang": "en", "target_lang": "ro"}
    facts = running.draft(tmp_path, task=kind).rows.facts  # pyright: ignore[reportOptionalMemberAccess]
    assert facts.form == "translation"
    chosen = translation(**kind).pairs({"translation": [pair["translation"] for pair in pairs[:2]]})
    assert chosen == ([row["text"] for row in rows(2)], [row["summary"] for row in rows(2)])
    place(tmp_path / "flat", rows(12, ("source", "target")), rows(4, ("source", "target")))
    assert running.draft(tmp_path / "flat", task="translation").rows.facts.form == "columns"  # pyright: ignore


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"title": "a"}, {}, "neither `translation` nor `source` and `target`"),
        ({"translation": {"en": "a", "ro": "b"}}, {}, "is missing; write one of en, ro"),
        ({"translation": {"en": "a", "ro": "b"}}, {"source_lang": "fr"}, "`fr` is no language of train.jsonl"),
        (
            {"translation": {"en": "a", "ro": " "}},
            {"source_lang": "en", "target_lang": "ro"},
            "row 1: there is no text in `ro`",
        ),
    ],
)
def test_translations_are_refused(tmp_path: Path, row: dict[str, Any], keys: dict[str, str], said: str) -> None:
    place(tmp_path, [row] * 4, [row])
    with pytest.raises(PlanError) as caught:
        running.draft(tmp_path, task={"type": "translation", **keys})
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["summarization", "translation"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("engine.tasks.written.find_spec", lambda _: None)
    names = SEQ2SEQ if kind == "summarization" else ("source", "target")
    place(tmp_path, rows(12, names), rows(4, names))
    with pytest.raises(PlanError, match=rf"is not installed; run `pip install frostline\[{kind}\]`"):
        running.draft(tmp_path, task=kind)


# What comes out


def test_rouge_knows_sentences_and_stems() -> None:
    facts, names = Facts(), ("rouge1", "rouge2", "rougeL", "rougeLsum")
    found = summarization().score(["The cats sat. It rained."], ["It rained. The cat sat."], names, facts)
    assert found["rouge1"] == found["rougeLsum"] == 1.0
    assert found["rougeL"] == pytest.approx(3 / 5)
    assert found["rouge2"] == pytest.approx(3 / 4)
    assert summarization().score(["a", "b"], ["a", "c"], ("rouge1",), facts) == {"rouge1": 0.5}


def test_chrf_and_bleu_of_a_split() -> None:
    same = ["the film is very good", "a dull plot and no fun"]
    assert translation().score(same, same, ("chrf", "bleu"), Facts()) == pytest.approx({"chrf": 100, "bleu": 100})
    worse = translation().score(["the film is good", "dull"], same, ("chrf", "bleu"), Facts())
    assert 0 < worse["bleu"] < worse["chrf"] < 100


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_judged_is_what_the_saved_model_writes(tmp_path: Path, beams: int) -> None:
    """With everything below the decoder's last block replayed, writing still goes through the whole model."""
    root = place(tmp_path, rows(40), rows(15))
    kind = {"type": "summarization", "max_target_length": 6, "num_beams": beams}
    stages = [
        stage("all", epochs=30, learning_rate=1e-2),
        stage("top", freeze=".*", unfreeze="decoder.block.1", epochs=2, learning_rate=1e-3),
    ]
    happened = running.run(
        root, task=kind, stages=stages, cache="auto", evaluation={"metric": "rouge1", "eval_steps": 50}
    )
    assert "replays" in running.events(happened, StageStarted)[1].frozen
    judged = [event for event in running.events(happened, Evaluated) if event.stage == "top"]
    best = max(event.metrics["rouge1"] for event in judged)
    assert best > 0.9
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(root / "runs/recipe/model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "runs/recipe/model")
    written = []
    for row in rows(15):
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=6, num_beams=beams, do_sample=False)
        written.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    own = summarization().score(written, [row["summary"] for row in rows(15)], ("rouge1",), Facts())
    assert own["rouge1"] == pytest.approx(best)


def test_nothing_is_written_where_the_loss_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it wrote")

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "generate", never)
    happened = running.run(place(tmp_path, rows(16), rows(5)), task="summarization", evaluation="loss")
    assert set(running.events(happened, Evaluated)[0].metrics) == {"loss"}
