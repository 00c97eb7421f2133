"""Audio classification: one label for a recording.

Recordings are decoded as they are read, brought to the model's own sampling rate, and padded batch by batch as its
feature extractor does. Nothing is cut but what the recipe, or the extractor itself, cuts off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from engine import metrics
from engine.tasks import labels, sounds
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import stop_at
from engine.tasks.files import not_files


class AudioClassification(Task):
    """One label for a recording: a word, a speaker, a language, a mood."""

    auto = "AutoModelForAudioClassification"
    processor = "AutoFeatureExtractor"
    columns = {
        "audio": ("audio", "sound", "speech", "file"),
        "label": ("label", "labels", "intent_class", "class", "target", "category", "language"),
    }
    target = "label"
    encoded_once = False

    type: Literal["audio-classification"]
    max_length_seconds: Annotated[float, Field(gt=0.1)] | None = None
    """Seconds after which a recording is cut; never if left out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        stop_at(not_files(table, "audio", "recordings") for table in tables.values())
        return labels.learn(tables, metrics.SINGLE)

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """The extractor's first input of each recording, unpadded wherever the extractor pads at all."""
        rate, name = processor.sampling_rate, processor.model_input_names[0]
        heard = [sounds.read(value, rate, self.max_length_seconds) for value in rows["audio"]]
        made = [processor(sound, sampling_rate=rate, return_tensors="np")[name][0] for sound in heard]
        return {name: made, "labels": labels.encode(rows["label"], facts)}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        def batch(examples: Sequence[Example]) -> dict[str, Any]:
            wanted = torch.tensor([example["labels"] for example in examples])
            return {**sounds.pad(processor, examples), "labels": wanted}

        return batch

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        return metrics.compute(names, facts.problem, predictions, references)
