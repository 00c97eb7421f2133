"""Sentence similarity: texts that mean the same get vectors that lie close (Sentence-BERT, Reimers & Gurevych 2019).

Pairs alone are taught against the other texts of their batch; pairs with a score are taught that score as their cosine.
A vector is pooled from the model's own output, so nothing but the model needs to be saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import metrics
from engine.errors import Problem
from engine.tasks import texts
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import bad_rows, missing, not_text, stop_at, wrong_kind

TEXTS = ("text", "text_pair", "negative")
RANKS = ("recall@1", "recall@5", "recall@10", "mrr")
CORRELATIONS = ("spearman", "pearson")
SCORED = "scores"
UNTAUGHT = ("labels", "part")
"""Fields of a batch that the model doesn't take: a pair's score, and which text of its example a row is."""


class SentenceSimilarity(Task):
    """Vectors of texts, close for texts that belong together."""

    auto = "AutoModel"
    columns = {
        "text": ("text", "anchor", "sentence1", "query", "question", "question1", "premise"),
        "text_pair": ("text_pair", "positive", "sentence2", "answer", "question2", "hypothesis", "passage"),
        "negative": ("negative",),
        "label": ("label", "score", "similarity_score", "labels"),
    }
    optional = frozenset({"negative", "label"})
    target = "label"
    new_head = False
    smooths = False

    type: Literal["sentence-similarity"]
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens after which a text is cut; the model's own limit if left out."""
    pooling: Literal["mean", "cls"] = "mean"
    """What a text's vector is: the mean of its tokens' vectors, or that of its first."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """The score that stands for a cosine of 1, such as 5 where scores go from 0 to 5."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """What cosines are divided by where a pair competes with the rest of its micro-batch: less sets them further apart.
    Pairs compete within one micro-batch of one device, so a smaller one makes for fewer, easier rivals."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        train = tables["train"]
        given = [name for name in TEXTS if name in train.columns]
        stop_at(not_text(table, name) for table in tables.values() for name in given)
        if "label" not in train.columns:
            rivals = " and the negatives" if "negative" in given else ""
            return Facts(members=len(given), notes=(f"each pair competes with the others of its batch{rivals}",))
        stop_at(_not_scores(table, self.scale) for table in tables.values())
        stop_at([_both(train)] if "negative" in given else [])
        return Facts(form=SCORED, members=2, notes=(_range(train),))

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        given = [name for name in TEXTS if name in rows]
        columns = zip(*(rows[name] for name in given), strict=True)
        most = texts.limit(self.max_length, processor)
        encoded = processor([text for row in columns for text in row], truncation=most is not None, max_length=most)
        part = list(range(len(given))) * len(rows["text"])
        scores = [float(value) / self.scale for value in rows.get("label", ()) for _ in given]
        return {**encoded, **texts.truncated(encoded), "part": part, **({"labels": scores} if scores else {})}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        return texts.padder(processor, texts.limit(self.max_length, processor))

    def trim(self, model: Any) -> None:
        """A pooler never reaches the loss, and in most sentence encoders it is random."""
        if getattr(model, "pooler", None) is not None:
            model.pooler = None

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in batch.items() if key not in UNTAUGHT}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """The model's outputs, with `vectors` (texts, width) of length 1 and the loss."""
        from torch.nn.functional import mse_loss, normalize

        outputs = model(**self.inputs(batch))
        vectors = pooled(outputs.last_hidden_state, batch["attention_mask"], self.pooling)
        outputs["vectors"] = normalize(vectors, dim=-1)
        if "labels" in batch:
            first, second = (outputs["vectors"][batch["part"] == part] for part in (0, 1))
            outputs["loss"] = mse_loss((first * second).sum(-1), batch["labels"][batch["part"] == 0].float())
        else:
            outputs["loss"] = in_batch_loss(outputs["vectors"], batch, self.temperature)
        return outputs

    def served(self, outputs: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The vector of each text beside what the model gives, as `sentence_embedding` (texts, width) of length 1."""
        from torch.nn.functional import normalize

        vectors = pooled(outputs.last_hidden_state, inputs["attention_mask"], self.pooling)
        return {**outputs, "sentence_embedding": normalize(vectors, dim=-1)}

    def weight(self, batch: Mapping[str, Any]) -> int:
        return int((batch["part"] == 0).sum())

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The cosine and the score of each pair; without scores the vectors of its two texts, (width,) each."""
        first, second = (outputs["vectors"][batch["part"] == part] for part in (0, 1))
        if "labels" not in batch:
            return first.cpu().numpy(), second.cpu().numpy()
        return (first * second).sum(-1).cpu().numpy(), batch["labels"][batch["part"] == 0].cpu().numpy()

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        if facts.form == SCORED:
            return metrics.compute(names, metrics.REGRESSION, predictions, references)
        found = ranked(predictions, references)
        return {name: found[name] for name in names}

    def default_metrics(self, facts: Facts) -> tuple[str, ...]:
        return CORRELATIONS if facts.form == SCORED else RANKS

    def known_metrics(self, facts: Facts) -> tuple[str, ...]:
        return self.default_metrics(facts)

    def accompany(self, folder: Path) -> None:
        """The files by which sentence-transformers pools as was trained here."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        listed = [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(modules)
        ]
        pooling = {f"pooling_mode_{kind}": kind.startswith(self.pooling) for kind in ("cls_token", "mean_tokens")}
        written = {
            "modules.json": listed,
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
            "1_Pooling/config.json": {"word_embedding_dimension": config["hidden_size"], **pooling},
        }
        (folder / "1_Pooling").mkdir()
        for name, value in written.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def pooled(states: Any, mask: Any, how: str) -> Any:
    """One vector a text (texts, width), in float32: padding has no part in it."""
    import torch

    if how == "cls":
        return states[torch.arange(len(states), device=states.device), mask.argmax(1)].float()
    live = mask[..., None].float()
    return (states.float() * live).sum(1) / live.sum(1).clamp(min=1)


def in_batch_loss(vectors: Any, batch: Mapping[str, Any], temperature: float) -> Any:
    """Cross-entropy of each text's own partner among all partners and negatives (Henderson et al. 2017).

    A rival that is the same text as the partner, or whose own text is the same, is right as well: it doesn't compete.
    """
    import torch
    from torch.nn.functional import cross_entropy

    first = batch["part"] == 0
    scores = vectors[first] @ vectors[~first].T / temperature
    rivals, parts = batch["input_ids"][~first], batch["part"][~first]
    partners, anchors = batch["input_ids"][batch["part"] == 1], batch["input_ids"][first]
    own = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    places = (parts == 1).nonzero()[:, 0]
    own[torch.arange(len(places), device=places.device), places] = True
    alike = _alike(partners, rivals)
    alike[:, parts == 1] |= _alike(anchors, anchors)
    return cross_entropy(scores.masked_fill(alike & ~own, float("-inf")), places)


def _alike(ids: Any, others: Any) -> Any:
    return (ids[:, None] == others[None]).all(-1)


def ranked(texts: Sequence[Any], partners: Sequence[Any]) -> dict[str, float]:
    """How early each text finds its own partner among the partners of all: recall@k and mean reciprocal rank.

    A partner that equals another takes no rank from it.
    """
    import numpy as np

    ours, theirs = np.stack(texts), np.stack(partners)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return dict.fromkeys(RANKS, float("nan"))
    ranks = []
    for start in range(0, len(ours), 1024):
        scores = ours[start : start + 1024] @ theirs.T
        own = scores[np.arange(len(scores)), start + np.arange(len(scores))]
        ranks.append((scores > own[:, None] + 1e-6).sum(1))
    rank = np.concatenate(ranks)
    recalls = {name: float((rank < int(name.partition("@")[2])).mean()) for name in RANKS if "@" in name}
    return {**recalls, "mrr": float((1 / (rank + 1)).mean())}


def _not_scores(table: Table, scale: float) -> Problem | None:
    """The problem of scores that stand for no cosine."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if problem := wrong_kind(table, "label") or missing(table, "label"):
        return problem
    values = table.columns["label"]
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        return Problem(("data", "columns", "label"), f"{table.name}: `label` holds {values.type} values, not scores")
    numbers = values.cast(pa.float64())
    outside = pc.invert(pc.and_(pc.greater_equal(numbers, -scale), pc.less_equal(numbers, scale)))
    first, most = numbers[max(pc.index(outside, True).as_py(), 0)].as_py(), pc.max(pc.abs(numbers)).as_py()
    what = f"`label` is {first:g}, and a score of {scale:g} stands for a cosine of 1 already"
    return bad_rows(table, "label", outside, what, f"say what stands for 1, such as `scale: {most:g}`")


def _both(table: Table) -> Problem:
    what = f"{table.name} has a `label` and a `negative`: a pair is taught by its score or against others, not both"
    return Problem(("data", "columns", "negative"), what, "leave one of the columns out")


def _range(train: Table) -> str:
    import pyarrow.compute as pc

    low, high = (float(bound) for bound in pc.min_max(train.columns["label"]).as_py().values())
    return f"the cosine of each pair is taught its `label`, between {low:g} and {high:g}"
