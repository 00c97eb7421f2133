"""Pairs come closer than strangers, scores become cosines, and a saved model gives the vectors it was judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
import transformers
from running import FROZEN, draft, events, place, refused, run, stage
from torch.nn.functional import cross_entropy, normalize

from engine.records import Evaluated, StageStarted
from engine.tasks import Facts
from engine.tasks.sentence_similarity import SentenceSimilarity, in_batch_loss, pooled, ranked

TASK = "sentence-similarity"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def pairs(count: int) -> list[dict[str, Any]]:
    """A text and its words in another order."""
    texts = [row["text"] for row in tiny.reviews(count)]
    return [{"anchor": text, "positive": " ".join(reversed(text.split()))} for text in texts]


def scored(count: int) -> list[dict[str, Any]]:
    """Texts that share none of their moods, or both, with 0 or 5 as their score."""
    rows = tiny.reviews(count + 1)
    return [
        {"sentence1": one["text"], "sentence2": two["text"], "score": 5.0 * (one["label"] == two["label"])}
        for index, one in enumerate(rows[:count])
        for two in [rows[index + 1] if index % 3 else rows[(index + 2) % count]]
    ]


def home(root: Path, made: list[dict[str, Any]]) -> Path:
    return place(root, tiny.bert(kind="BertModel"), made[:48], made[48:])


def test_padding_has_no_part_in_a_vector() -> None:
    states, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    torch.testing.assert_close(pooled(states, mask, "mean")[0], states[0, :2].mean(0))
    torch.testing.assert_close(pooled(states, mask, "cls"), torch.stack((states[0, 0], states[1, 1])))


def batch_of(texts: list[list[int]], members: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(texts), "part": torch.arange(len(texts)) % members}


def test_a_pair_competes_with_the_partners_and_negatives_of_its_batch() -> None:
    vectors = normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    loss = in_batch_loss(vectors, batch_of([[index] for index in range(9)], 3), 0.1)
    anchors, partners, negatives = vectors[0::3], vectors[1::3], vectors[2::3]
    scores = anchors @ torch.cat((partners, negatives)).T / 0.1
    torch.testing.assert_close(loss, cross_entropy(scores, torch.arange(3)))


def test_equal_texts_are_no_rivals() -> None:
    vectors = normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    # the second pair has the first one's partner, the third one the first one's text
    loss = in_batch_loss(vectors, batch_of([[1], [2], [3], [2], [1], [4]], 2), 1.0)
    scores = vectors[0::2] @ vectors[1::2].T
    scores[0, 1] = scores[1, 0] = scores[0, 2] = scores[2, 0] = -torch.inf
    torch.testing.assert_close(loss, cross_entropy(scores, torch.arange(3)))


def test_ranks_are_those_of_the_partner_among_all() -> None:
    eye = np.eye(4, dtype=np.float32)
    assert ranked(list(eye), list(eye)) == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "mrr": 1.0}
    turned = ranked(list(eye), [eye[1], eye[0], eye[2], eye[3]])
    assert turned["recall@1"] == 0.5
    assert turned["recall@5"] == 1.0
    assert np.isnan(ranked([eye[0] * np.nan], [eye[0]])["mrr"])


def test_a_random_pooler_is_taken_off_and_embeddings_are_found(tmp_path: Path) -> None:
    made = draft(home(tmp_path, pairs(64)), task=TASK, freeze=["@embeddings"])
    assert not any("pooler" in parameter.name for parameter in made.outline.parameters)
    assert (made.outline.head, made.outline.embeddings) == ((), ("embeddings",))


def test_a_saved_model_gives_the_vectors_it_was_judged_by(tmp_path: Path) -> None:
    keys = {"task": TASK, "freeze": FROZEN, "stages": [stage(unfreeze="@blocks[-1:]", epochs=3)]}
    happened = run(home(tmp_path, pairs(64)), **keys)
    folder = tmp_path / "runs/recipe/model"
    tokenizer, model = (kind.from_pretrained(folder) for kind in (transformers.AutoTokenizer, transformers.AutoModel))
    sides = []
    for side in ("anchor", "positive"):
        batch = tokenizer([row[side] for row in pairs(64)[48:]], padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model.eval()(**batch).last_hidden_state
        live = batch["attention_mask"][..., None]
        sides.append(list(normalize((states * live).sum(1) / live.sum(1), dim=-1).numpy()))
    best = max(events(happened, Evaluated), key=lambda event: event.metrics["recall@1"]).metrics
    assert ranked(*sides) == pytest.approx({name: best[name] for name in ("recall@1", "recall@5", "recall@10", "mrr")})
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    assert (pooling["pooling_mode_mean_tokens"], pooling["pooling_mode_cls_token"]) == (True, False)
    assert pooling["word_embedding_dimension"] == 16
    assert [part["path"] for part in json.loads((folder / "modules.json").read_text())] == ["", "1_Pooling"]


@pytest.mark.parametrize("made", [pairs(64), scored(64)], ids=["pairs", "scores"])
def test_replayed_equals_computed_and_pairs_come_closer(tmp_path: Path, made: list[dict[str, Any]]) -> None:
    task = {"type": TASK, **({"scale": 5.0} if "score" in made[0] else {})}
    keys = {"task": task, "freeze": FROZEN, "stages": [stage(unfreeze="@blocks[-2:]", epochs=5)]}
    plain = run(home(tmp_path, made), **keys)
    kept = run(tmp_path, **keys, cache="auto")
    assert events(kept, StageStarted)[0].frozen.startswith("replays ")
    metrics = [[event.metrics for event in events(happened, Evaluated)] for happened in (plain, kept)]
    assert metrics[0] == [pytest.approx(each, abs=1e-4) for each in metrics[1]]
    assert metrics[0][-1]["loss"] < metrics[0][0]["loss"]
    assert set(metrics[0][0]) - {"loss"} == ({"spearman", "pearson"} if "score" in made[0] else {*RANKS})


RANKS = ("recall@1", "recall@5", "recall@10", "mrr")


def test_negatives_are_third_texts(tmp_path: Path) -> None:
    made = [{**row, "negative": "the dull cast"} for row in pairs(64)]
    happened = run(home(tmp_path, made), task=TASK)
    assert any("and the negatives" in getattr(event, "sentence", "") for event in happened)
    assert events(happened, StageStarted)[0].steps == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"score": 6.0}, "train.jsonl, row 3: `label` is 6, and a score of 5 stands for a cosine of 1 already"),
        ({"score": None}, "train.jsonl, row 3: `label` has no value"),
        ({"score": "high"}, 'train.jsonl, row 3: `label` is "high", not float as above'),
    ],
)
def test_scores_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    made = scored(64)
    made[2] = {**made[2], **row}
    _, sentence = refused(home(tmp_path, made), task={"type": TASK, "scale": 5.0})
    assert sentence.startswith(said)


def test_a_score_and_a_negative_are_refused(tmp_path: Path) -> None:
    made = [{**row, "negative": "the dull cast"} for row in scored(64)]
    assert "not both" in refused(home(tmp_path, made), task={"type": TASK, "scale": 5.0})[1]


def test_weight_counts_pairs() -> None:
    task = SentenceSimilarity(type=TASK)
    rows = {"text": ["the film", "a cast"], "text_pair": ["film the very", "cast"], "negative": ["no", "fun"]}
    made = task.encode(rows, tiny.tokenizer(), Facts(members=3))
    made.pop("truncated")
    batch = task.collate(tiny.tokenizer())(
        [dict(zip(made, each, strict=True)) for each in zip(*made.values(), strict=True)]
    )
    assert task.weight(batch) == 2
    assert batch["part"].tolist() == [0, 1, 2, 0, 1, 2]
    assert set(task.inputs(batch)) == {"input_ids", "token_type_ids", "attention_mask"}
