"""Translation: a text in another language, judged by chrF (Popović 2015) and BLEU (Post 2018), from 0 to 100."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from engine.errors import PlanError, Problem
from engine.tasks.base import Facts, Table
from engine.tasks.columns import bad_rows, missing, not_text, stop_at, wrong_kind
from engine.tasks.written import Written

PAIR = "translation"


class Translation(Written):
    """A text in another language."""

    columns = {
        PAIR: (PAIR,),
        "source": ("source", "src", "text"),
        "target": ("target", "tgt", "reference"),
    }
    optional = frozenset(columns)
    target = "target"
    own_metrics = ("chrf", "bleu")
    library = ("sacrebleu", "sacrebleu")

    type: Literal["translation"]
    source_lang: str | None = None
    """Where rows are mappings such as `{en: ..., ro: ...}`: the language that is read."""
    target_lang: str | None = None
    """The language that is written."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        self.need_library()
        there = tables["train"].columns
        if {"source", "target"} <= there.keys():
            stop_at(not_text(table, name) for table in tables.values() for name in ("source", "target"))
            return Facts(form="columns")
        if PAIR not in there:
            what = f"there is neither `translation` nor `source` and `target` among {', '.join(there)}"
            raise PlanError([Problem(("data", "columns"), what, "write `columns: {source: ..., target: ...}`")])
        stop_at(self._bad_pairs(table) for table in tables.values())
        return Facts(form=PAIR)

    def _bad_pairs(self, table: Table) -> Problem | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        values = table.columns[PAIR]
        if problem := wrong_kind(table, PAIR) or missing(table, PAIR):
            return problem
        known = [field.name for field in values.type] if pa.types.is_struct(values.type) else []
        wanted = {"source_lang": self.source_lang, "target_lang": self.target_lang}
        for key, language in wanted.items():
            if language not in known:
                what = f"`{language}` is no language of {table.name}" if language else "is missing"
                return Problem(("task", key), what, f"write one of {', '.join(known)}" if known else "")
            texts = pc.struct_field(values, [language])
            empty = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), True)
            if problem := bad_rows(table, PAIR, empty, f"there is no text in `{language}`", "leave the row out"):
                return problem
        return None

    def pairs(self, rows: Mapping[str, Sequence[Any]]) -> tuple[list[str], list[str]]:
        if PAIR not in rows or {"source", "target"} <= set(rows):
            return list(rows["source"]), list(rows["target"])
        both = rows[PAIR]
        return [row[self.source_lang] for row in both], [row[self.target_lang] for row in both]

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """Scores of the whole split, in sacrebleu's standard settings."""
        if not names:
            return {}
        import sacrebleu

        kinds = {"chrf": sacrebleu.corpus_chrf, "bleu": sacrebleu.corpus_bleu}
        return {name: kinds[name](list(predictions), [list(references)]).score for name in names}
