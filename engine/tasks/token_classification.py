"""Token classification: a tag for each word, taught and judged on the word's first token.

A word that the limit cuts off is neither taught nor judged; how many texts lose some is said when they are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import metrics
from engine.errors import PlanError, Problem
from engine.tasks import texts
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import bad_items, bad_rows, not_lists, stop_at
from engine.tasks.entities import in_chunks, scores
from engine.tasks.labels import declared_or_found, written
from engine.tasks.texts import IGNORED

ENTITIES = ("f1", "precision", "recall", "accuracy")
"""Of whole entities, all kinds counted together, and of words."""


class TokenClassification(Task):
    """A tag for each word of a text: entities, slots, parts of speech."""

    auto = "AutoModelForTokenClassification"
    columns = {
        "tokens": ("tokens", "words"),
        "tags": ("tags", "ner_tags", "labels", "label", "slots", "pos_tags", "upos", "chunk_tags"),
    }
    processor_settings = {"add_prefix_space": True}
    """A word is read as it is within a text: byte-level tokenizers take the blank before it for a part of it."""
    target = "tags"

    type: Literal["token-classification"]
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a text is cut; the model's own limit if left out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        import pyarrow.compute as pc

        stop_at(map(_uneven, tables.values()))
        train = tables["train"]
        declared = getattr(getattr(train.features["tags"], "feature", None), "names", None)
        found = pc.unique(pc.list_flatten(train.columns["tags"]))
        names, form = declared_or_found(declared, found.cast("string").to_pylist(), found.type)
        known = list(map(str, range(len(names)))) if form == "ids" else names
        stop_at(_unknown(table, known, len(names)) for table in tables.values())
        if len(names) < 2:
            what = f"{train.name}: every word has the tag `{names[0]}`, so there is nothing to tell apart"
            raise PlanError([Problem(("data", "columns", "tags"), what)])
        judged = "entities" if in_chunks(names) else "words, for no tag begins with B- or I-"
        note = f"{len(names)} tags in train; what is judged are {judged}"
        return Facts(names, "", form, {"num_labels": len(names)}, (note,))

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        texts.need_fast(processor, "a tag for each word")
        most = texts.limit(self.max_length, processor)
        words = list(rows["tokens"])
        encoded = processor(words, is_split_into_words=True, truncation=most is not None, max_length=most)
        ids = {name: index for index, name in enumerate(facts.labels)}
        labels = []
        for index, tags in enumerate(rows["tags"]):
            wanted = [int(tag) if facts.form == "ids" else ids[written(tag)] for tag in tags]
            labels.append(first_tokens(encoded.word_ids(index), wanted))
        return {**encoded, **texts.truncated(encoded), "labels": labels}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        return texts.token_padder(processor, texts.limit(self.max_length, processor))

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Per example the tag ids of its words, (words,) each."""
        decided, labels = outputs.logits.argmax(-1).cpu().numpy(), batch["labels"].cpu().numpy()
        live = labels != IGNORED
        return (
            [row[words] for row, words in zip(decided, live, strict=True)],
            [row[words] for row, words in zip(labels, live, strict=True)],
        )

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        import numpy as np

        if in_chunks(facts.labels):
            tagged = ([[facts.labels[tag] for tag in row] for row in rows] for rows in (predictions, references))
            found = scores(*tagged)
            return {name: found[name] for name in names}
        taken, right = np.concatenate(predictions), np.concatenate(references)
        return {name: metrics.METRICS[name].compute(taken, right) for name in names}

    def default_metrics(self, facts: Facts) -> tuple[str, ...]:
        return ENTITIES if in_chunks(facts.labels) else ("accuracy", "f1")

    def known_metrics(self, facts: Facts) -> tuple[str, ...]:
        if in_chunks(facts.labels):
            return ENTITIES
        return tuple(name for name in metrics.serving(metrics.SINGLE) if not metrics.METRICS[name].from_scores)


def first_tokens(words: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """One label per token: a word's on its first token, and the ignored one on the rest and between words."""
    before = [None, *words[:-1]]
    fresh = [word is not None and word != last for word, last in zip(words, before, strict=True)]
    return [labels[word] if new and word is not None else IGNORED for word, new in zip(words, fresh, strict=True)]


def _uneven(table: Table) -> Problem | None:
    """The problem of a split whose rows aren't words with a tag each."""
    import pyarrow.compute as pc

    if problem := not_lists(table, "tokens", "words") or not_lists(table, "tags"):
        return problem
    words, tags = (pc.list_value_length(table.columns[name]) for name in ("tokens", "tags"))
    differ = pc.not_equal(words, tags)
    index = max(pc.index(differ, True).as_py(), 0)
    what = f"`tags` has {tags[index].as_py()} tags for {words[index].as_py()} words"
    return bad_rows(table, "tags", differ, what, "give each word one tag")


def _unknown(table: Table, known: Sequence[str], count: int) -> Problem | None:
    """The problem of a tag that no training row has, or that stands for none of the declared ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tags = pc.list_flatten(table.columns["tags"]).cast("string")
    strange = pc.invert(pc.is_in(tags, value_set=pa.array(known, tags.type)))
    if (first := pc.index(strange, True).as_py()) < 0:
        return None
    said = f"the tag `{tags[first].as_py()}` is none of the {count} of the training rows"
    return bad_items(table, "tags", strange, said, "add training rows of it or leave the row out")
