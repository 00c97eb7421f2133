"""The contestants of scripts/bench_peers.py: each does a scenario's work in a process of its own and prints a result.

    python scripts/_contestants.py CONTESTANT SCENARIO DATA EPOCHS FOLDER

Everyone gets the same model, rows, batch size, epochs and rates, keeps its other defaults, and judges after each epoch.
`training` is what lies between a model in memory and its last evaluation: with us also the search for the frost line,
capture, its check and the checkpoints; with the peers the building of their trainers. The peers get their examples
encoded and in memory beforehand. Libraries are imported before, with everyone: scikit-learn, which we score with and
the peers don't, is part of the whole process and no part of training.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _scenarios
import numpy as np
import torch
from _scenarios import BATCH, ROOT, SEED, Result, Scenario

sys.path.insert(0, str(ROOT))  # for the peers' environment, which Frostline isn't installed in
Example = dict[str, Any]


class Clock:
    """CPU and wall seconds between `start` and the last `stop`."""

    def start(self) -> None:
        self.began = time.process_time(), time.perf_counter()

    def stop(self, result: Result) -> None:
        result.train_cpu = time.process_time() - self.began[0]
        result.train_wall = time.perf_counter() - self.began[1]


# Ours


def cached(scenario: Scenario, data: Path, folder: Path) -> Result:
    """As a recipe says it."""
    return _ours(scenario, data, folder, True)


def uncached(scenario: Scenario, data: Path, folder: Path) -> Result:
    """The same recipe with `cache: off`."""
    return _ours(scenario, data, folder, False)


def constant(scenario: Scenario, data: Path, folder: Path) -> Result:
    """Rates that stay what they are, as finetuning-scheduler's do: to compare what is learned."""
    return _ours(scenario, data, folder, True, ["training.lr_scheduler_type=constant"], own="constant")


def again(scenario: Scenario, data: Path, folder: Path) -> Result:
    """A second run, with another seed, on what `cached` has kept."""
    return _ours(scenario, data, folder, True, ["seed=14"])


def _ours(
    scenario: Scenario, data: Path, folder: Path, cache: bool, overrides: Sequence[str] = (), own: str = "runs"
) -> Result:
    from ruamel.yaml import YAML

    from engine import start
    from engine.load import load
    from engine.records import Evaluated, StageEnded, StageStarted, Started

    file, clock, result = folder / f"recipe-{os.getpid()}.yaml", Clock(), Result()
    with file.open("w") as stream:
        YAML().dump(_scenarios.recipe(scenario, data, cache), stream)
    for event in start.run(load(file, overrides), file.stem, ROOT, folder / own, fresh=True):
        match event:
            case Started():
                clock.start()
            case StageStarted():
                result.sizes = (*result.sizes, event.size)
                if cache and not event.replayed:
                    raise SystemExit(f"{scenario.name}: {event.frozen}")
            case Evaluated():
                result.accuracy, result.evaluations = event.metrics["accuracy"], result.evaluations + 1
            case StageEnded():
                clock.stop(result)
    return result


# What the peers get


def place_of(scenario: Scenario) -> str:
    """The folder of the pretrained model."""
    from engine.models import source
    from engine.recipe import Model

    return source(Model(path=_scenarios.recipe(scenario, Path(), False)["model"]), ROOT)


def model(scenario: Scenario, labels: int) -> Any:
    """The model with a new head."""
    import transformers

    transformers.set_seed(SEED)
    kind = transformers.AutoModelForSequenceClassification
    if not scenario.text:
        kind = transformers.AutoModelForImageClassification
    return kind.from_pretrained(place_of(scenario), num_labels=labels, ignore_mismatched_sizes=True)


def open_to(found: torch.nn.Module, scenario: Scenario, phase: int) -> int:
    """Set what trains in a stage as everyone does by hand; returns how many numbers that is."""
    for name, parameter in found.named_parameters():
        parameter.requires_grad_(scenario.trains(name, phase))
    return sum(parameter.numel() for parameter in found.parameters() if parameter.requires_grad)


def examples(scenario: Scenario, data: Path) -> tuple[dict[str, list[Example]], int, Callable[..., Any]]:
    """Each split's encoded examples, the number of labels, and what puts examples into one batch."""
    return _questions(data, place_of(scenario)) if scenario.text else _pictures(data, place_of(scenario))


def _questions(data: Path, model: str) -> tuple[dict[str, list[Example]], int, Callable[..., Any]]:
    import datasets
    import transformers

    files = {split: str(data / f"{split}.jsonl") for split in ("train", "validation")}
    rows = datasets.load_dataset("json", data_files=files, cache_dir=str(data / "kept"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    names = sorted(set(rows["train"]["label"]))

    def encode(row: Example) -> Example:
        return {**tokenizer(row["text"], truncation=True), "label": names.index(row["label"])}

    splits = {split: [encode(row) for row in rows[split]] for split in files}
    return splits, len(names), transformers.DataCollatorWithPadding(tokenizer)


def _pictures(data: Path, model: str) -> tuple[dict[str, list[Example]], int, Callable[..., Any]]:
    import datasets
    import transformers

    rows = datasets.load_dataset("imagefolder", data_dir=str(data), cache_dir=str(data.parent / "kept"))
    processor = transformers.ViTImageProcessorPil.from_pretrained(model)

    def look(row: Example) -> Example:
        pixels = processor(images=row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": row["label"]}

    splits = {split: [look(row) for row in rows[split]] for split in ("train", "validation")}
    return splits, rows["train"].features["label"].num_classes, transformers.default_data_collator


# transformers.Trainer


def trainer(scenario: Scenario, data: Path, folder: Path) -> Result:
    """A fresh `Trainer` for each stage, with its defaults."""
    return _trainer(scenario, data, folder)


def grouped(scenario: Scenario, data: Path, folder: Path) -> Result:
    """The same with `train_sampling_strategy="group_by_length"`, which is our default."""
    return _trainer(scenario, data, folder, train_sampling_strategy="group_by_length")


def _trainer(scenario: Scenario, data: Path, folder: Path, **more: Any) -> Result:
    import transformers

    splits, labels, collate = examples(scenario, data)
    found = model(scenario, labels)
    clock, result = Clock(), Result()
    clock.start()
    for place, phase in enumerate(scenario.phases):
        result.sizes = (*result.sizes, open_to(found, scenario, place))
        arguments = transformers.TrainingArguments(
            output_dir=str(folder / "trainer"),
            num_train_epochs=phase.epochs,
            learning_rate=phase.rate,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            eval_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
            **more,
        )
        one = transformers.Trainer(
            found,
            arguments,
            data_collator=collate,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=lambda seen: {"accuracy": float(np.mean(seen.predictions.argmax(-1) == seen.label_ids))},
        )
        one.remove_callback(transformers.PrinterCallback)
        one.train()
        judged = [line["eval_accuracy"] for line in one.state.log_history if "eval_accuracy" in line]
        result.accuracy, result.evaluations = judged[-1], result.evaluations + len(judged)
    clock.stop(result)
    return result


# finetuning-scheduler


def scheduler(scenario: Scenario, data: Path, folder: Path) -> Result:
    """One Lightning `Trainer` with the callback FinetuningScheduler, stages by epochs, its defaults otherwise."""
    from finetuning_scheduler import FinetuningScheduler
    from lightning import LightningModule, Trainer, seed_everything

    splits, labels, collate = examples(scenario, data)
    found = model(scenario, labels)
    seed_everything(SEED, verbose=False)
    result = Result()

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = found

        def training_step(self, batch: Any, _place: int) -> Any:
            return self.model(**batch).loss

        def validation_step(self, batch: Any, _place: int) -> None:
            outputs = self.model(**batch)
            right = (outputs.logits.argmax(-1) == batch["labels"]).float().mean()
            self.log_dict({"val_loss": outputs.loss, "accuracy": right}, batch_size=len(batch["labels"]))

        def on_validation_epoch_end(self) -> None:
            result.accuracy = float(self.trainer.callback_metrics["accuracy"])
            result.evaluations += 1

        def on_train_epoch_start(self) -> None:
            size = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
            result.sizes = result.sizes if size in result.sizes else (*result.sizes, size)

        def configure_optimizers(self) -> Any:
            trains = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.AdamW(trains, lr=scenario.phases[0].rate, weight_decay=0.0)

    def loader(split: str) -> Any:
        return torch.utils.data.DataLoader(splits[split], BATCH, shuffle=split == "train", collate_fn=collate)

    clock = Clock()
    clock.start()
    one = Trainer(
        max_epochs=sum(phase.epochs for phase in scenario.phases),
        accelerator="cpu",
        devices=1,
        callbacks=[FinetuningScheduler(_schedule(scenario, found), epoch_transitions_only=True, logging_level=40)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=str(folder / "scheduler"),
    )
    one.fit(Module(), loader("train"), loader("validation"))
    clock.stop(result)
    return result


def _schedule(scenario: Scenario, found: torch.nn.Module) -> dict[int, Any]:
    """The scenario in finetuning-scheduler's words; epochs count from the beginning of the run."""
    schedule, epoch, seen = {}, 0, set()
    for place, phase in enumerate(scenario.phases):
        epoch += phase.epochs
        names = [name for name, _ in found.named_parameters() if scenario.trains(name, place) and name not in seen]
        seen.update(names)
        schedule[place] = {
            "params": [f"model.{name}" for name in names],
            "lr": phase.rate,
            "max_transition_epoch": epoch,
        }
    return schedule


CONTESTANTS = {each.__name__: each for each in (cached, uncached, again, constant, trainer, grouped, scheduler)}


def main(name: str, scenario: str, data: str, epochs: str, folder: str) -> None:
    import sklearn.metrics  # noqa: F401
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = _scenarios.scenarios(int(epochs))[scenario]
    result = CONTESTANTS[name](found, Path(data), Path(folder))
    print(f"\n{result.line()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
