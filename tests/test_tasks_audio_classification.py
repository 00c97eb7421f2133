"""Audio classification, whole runs: learnt, padded, masked by the seed, replayed, loaded by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import running
import senses
import torch
import transformers
from torch import nn

from engine.records import Evaluated, StageStarted, Step
from engine.tasks import sounds
from engine.tasks.audio_classification import AudioClassification

TASK = AudioClassification(type="audio-classification")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    senses.tones(tmp_path / "rows")
    senses.save_sound_model(senses.wav2vec2(num_labels=2), tmp_path / "model")
    return tmp_path


def run(root: Path, **keys: Any) -> list[Any]:
    plain = {"task": "audio-classification", "freeze": "feature_extractor"}
    return running.run(root, **{**plain, "stages": [running.stage(epochs=4)], **keys})


def losses(happened: list[Any]) -> list[float]:
    return [event.loss for event in running.events(happened, Step)]


def test_it_learns_tones(root: Path) -> None:
    happened = run(root)
    assert running.events(happened, Evaluated)[-1].metrics["accuracy"] == 1.0
    model = transformers.AutoModelForAudioClassification.from_pretrained(root / "runs/recipe/model").eval()
    extract = transformers.AutoFeatureExtractor.from_pretrained(root / "runs/recipe/model")
    for name, hertz in senses.TONES.items():
        sound = (senses.tone(hertz, 0.2, seed=9) / 2**15).astype(np.float32)
        with torch.no_grad():
            logits = model(**extract(sound, sampling_rate=senses.RATE, return_tensors="pt")).logits
        assert model.config.id2label[int(logits.argmax())] == name


def test_masks_follow_from_the_seed(root: Path) -> None:
    np.random.seed(1)
    first = run(root)
    np.random.seed(2)
    assert losses(run(root)) == losses(first)
    assert losses(run(root, seed=7)) != losses(first)


def test_frozen_encoder_is_replayed_and_masks_nothing(root: Path) -> None:
    frozen = {"freeze": "wav2vec2"}
    plain, kept = run(root, **frozen), run(root, **frozen, cache="auto")
    (started,) = running.events(kept, StageStarted)
    assert started.frozen.startswith("replays")
    assert losses(kept) == pytest.approx(losses(plain), rel=1e-5)


def test_recordings_are_padded_to_the_longest_of_their_batch(root: Path) -> None:
    extract = transformers.AutoFeatureExtractor.from_pretrained(root / "model")
    files = [{"bytes": None, "path": str(root / f"rows/train/high/train-{index:03}.wav")} for index in (0, 2)]
    made = TASK.encode({"audio": files, "label": ["high", "high"]}, extract, _facts())
    examples = [dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True)]
    batch = TASK.collate(extract)(examples)
    assert batch["attention_mask"].sum(1).tolist() == [2_400, 2_720]
    heard = [sounds.read(file, senses.RATE) for file in files]
    both = extract(heard, sampling_rate=senses.RATE, padding=True, return_tensors="pt")
    torch.testing.assert_close(batch["input_values"], both["input_values"])
    assert batch["labels"].tolist() == [0, 0]


def test_recordings_are_cut_only_where_the_recipe_says_so(root: Path) -> None:
    extract = transformers.AutoFeatureExtractor.from_pretrained(root / "model")
    rows = {"audio": [{"bytes": None, "path": str(root / "rows/train/high/train-002.wav")}], "label": ["high"]}
    cut = AudioClassification(type="audio-classification", max_length_seconds=0.125)
    assert len(TASK.encode(rows, extract, _facts())["input_values"][0]) == 2_720
    assert len(cut.encode(rows, extract, _facts())["input_values"][0]) == 2_000


@pytest.mark.parametrize("family", ["Whisper", "AST"])
def test_spectrograms_train_as_well(root: Path, family: str) -> None:
    save(family, root / "model")
    happened = run(root, freeze=["@embeddings", "@blocks[:1]"], stages=[running.stage(steps=2)], cache="auto")
    assert [event.step for event in running.events(happened, Evaluated)] == [2]


def test_plan_measures_a_skeleton_with_a_parameter_of_its_own_mind(root: Path) -> None:
    assert running.draft(root, task="audio-classification").outline.measured


def save(family: str, folder: Path) -> None:
    if family == "Whisper":
        extract: Any = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        config: Any = transformers.WhisperConfig(
            d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, num_mel_bins=16, max_source_positions=50, num_labels=2, classifier_proj_size=8,
        )  # fmt: skip
        kind: Any = transformers.WhisperForAudioClassification
    else:
        extract = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64)
        config = transformers.ASTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_mel_bins=16,
            max_length=64, num_labels=2,
        )  # fmt: skip
        kind = transformers.ASTForAudioClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(config)
    model.save_pretrained(folder)
    extract.save_pretrained(folder)


def _facts() -> Any:
    from engine.tasks import Facts

    return Facts(("high", "low"), "single_label_classification", "names")
