"""From a bare clone to a fine-tuned model and a table that says whether it was worth it: three minutes on two cores.

Makes `.venv` and the data, scores two baselines, prints the plan of recipes/trec.yaml and runs it. Needs Python 3.11
and a package index; nothing is taken from the Hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import _venv

RECIPE = "recipes/trec.yaml"
RUN = Path("runs/trec")
Scores = dict[str, float]
"""Accuracy by split."""


def main() -> int:
    _venv.enter()
    os.chdir(_venv.ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # accelerate launch would set 1
    import _trec

    splits = _trec.prepare(Path("data/trec"))
    print("data/trec: " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()) + ", no question twice")
    baselines = {"the commonest label": majority(splits), "TF-IDF + logistic regression": tf_idf(splits)}
    show(["frostline", "plan", RECIPE])
    show(["accelerate", "launch", "engine/run.py", RECIPE, "--fresh"])
    print(table(baselines | stages(RUN / "metrics.jsonl")))
    print(f"\nThe model and everything the run wrote down: {RUN}/\nNext, perhaps:")
    for command in following():
        print(f"  {command}")
    return 0


def following() -> list[str]:
    """Three commands to try next, as they are typed without activating the environment."""
    scripts = _venv.SCRIPTS.relative_to(_venv.ROOT)
    return [
        f"{scripts / 'accelerate'} launch engine/run.py {RECIPE} --name slower stages.top.learning_rate=1e-4",
        f"{scripts / 'frostline'} plan {RECIPE} stages.top.unfreeze=layer.5   # what would train",
        "python3 scripts/test.py   # what a change has to pass",
    ]


def majority(splits: dict[str, list[dict[str, str]]]) -> Scores:
    """What naming the commonest training label every time scores."""
    labels = [row["label"] for row in splits["train"]]
    commonest = max(sorted(set(labels)), key=labels.count)
    return {
        split: sum(row["label"] == commonest for row in splits[split]) / len(splits[split])
        for split in ("validation", "test")
    }


def tf_idf(splits: dict[str, list[dict[str, str]]]) -> Scores:
    """What a linear model on counted words and pairs of words scores, fitted to the same training rows.

    Of C in 1, 10, 30, 100 and n-grams up to 1, 2, 3 these settings do best on the validation rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    columns = {split: ([row["text"] for row in rows], [row["label"] for row in rows]) for split, rows in splits.items()}
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=100, max_iter=2000))
    model.fit(*columns["train"])
    return {split: float(model.score(*columns[split])) for split in ("validation", "test")}


def show(command: list[str]) -> None:
    """Prints a command and runs it; a command that fails ends the quickstart with its exit code."""
    print(f"\n$ {' '.join(command)}", flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


def stages(metrics: Path) -> dict[str, Scores]:
    """Each stage's best validation accuracy and, where it was read, its test accuracy."""
    scores: dict[str, Scores] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record.get("event") == "evaluated":
            stage = scores.setdefault(f"after stage {record['stage']}", {})
            stage[record["split"]] = max(stage.get(record["split"], 0.0), record["metrics"]["accuracy"])
    return scores


def table(scores: dict[str, Scores]) -> str:
    """One line a model, one column a split."""
    lines = [f"\n{'accuracy':30}{'validation':>12}{'test':>8}"]
    for name, by_split in scores.items():
        cells = [f"{by_split[split]:.3f}" if split in by_split else "" for split in ("validation", "test")]
        lines.append(f"{name:30}{cells[0]:>12}{cells[1]:>8}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
