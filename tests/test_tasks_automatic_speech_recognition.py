"""Speech recognition, whole runs: learnt by CTC, read letter by letter, judged by edits, and refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import running
import senses
import tiny
import torch
import transformers
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as some
from scipy.io import wavfile

from engine import data, load
from engine.errors import PlanError
from engine.records import Evaluated, StageStarted, Step
from engine.tasks import Facts
from engine.tasks.automatic_speech_recognition import AutomaticSpeechRecognition
from engine.tasks.edits import edits, error_rate

TASK = AutomaticSpeechRecognition(type="automatic-speech-recognition")
LETTERS = {"A": 400.0, "B": 1_200.0, "C": 3_000.0}
VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def speech(text: str, seed: int) -> np.ndarray:
    """A tone for each letter, 60 ms long, and silence before, between and after."""
    quiet = senses.tone(0, 0.04, seed=seed)
    parts = [quiet if letter == " " else senses.tone(LETTERS[letter], 0.06, seed=seed) for letter in text]
    return np.concatenate([quiet, *[sound for part in parts for sound in (part, quiet)]])


def said(index: int) -> str:
    draw = np.random.default_rng(index)
    words = ["".join(draw.choice(list(LETTERS), draw.integers(1, 4))) for _ in range(draw.integers(1, 3))]
    return " ".join(words)


def write(root: Path, split: str, texts: list[str], seed: int, taught: list[str] | None = None) -> None:
    folder = root / "rows" / split
    folder.mkdir(parents=True)
    for index, text in enumerate(texts):
        wavfile.write(folder / f"{index}.wav", senses.RATE, speech(text, seed + index))
    rows = [{"file_name": f"{index}.wav", "text": text} for index, text in enumerate(taught or texts)]
    tiny.write_jsonl(folder / "metadata.jsonl", rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "train", [said(index) for index in range(24)], 0)
    write(tmp_path, "validation", [said(index) for index in range(100, 108)], 100)
    save(tmp_path / "model")
    return tmp_path


def save(folder: Path, **config: Any) -> None:
    vocabulary = senses.write_json(folder / "vocab.json", {word: index for index, word in enumerate(VOCABULARY)})
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(vocabulary))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=senses.RATE, return_attention_mask=True)
    settings = {"vocab_size": len(VOCABULARY), "mask_time_prob": 0.0, **config}
    senses.wav2vec2("ForCTC", **settings).save_pretrained(folder)
    transformers.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)


def run(root: Path, **keys: Any) -> list[Any]:
    return running.run(root, **{"task": "automatic-speech-recognition", "stages": [running.stage()], **keys})


def test_it_learns_to_spell(root: Path) -> None:
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout", "feat_proj_dropout")
    save(root / "model", layerdrop=0.0, num_hidden_layers=2, **dict.fromkeys(dropouts, 0.0))
    happened = run(root, stages=[running.stage(epochs=40)], evaluation={"eval_steps": 60})
    first, *_, last = running.events(happened, Evaluated)
    assert set(last.metrics) == {"loss", "wer", "cer"}
    assert last.metrics["cer"] < 0.35 < first.metrics["cer"]
    model = root / "runs/recipe/model"
    recognise = transformers.AutoModelForCTC.from_pretrained(model).eval()
    processor = transformers.AutoProcessor.from_pretrained(model)
    heard = processor((speech("ABC", 7) / 2**15).astype(np.float32), sampling_rate=senses.RATE, return_tensors="pt")
    with torch.no_grad():
        assert processor.decode(recognise(**heard).logits[0].argmax(-1)) == "ABC"


def test_frozen_encoder_is_replayed(root: Path) -> None:
    plain = run(root, freeze="wav2vec2", stages=[running.stage(epochs=2)])
    kept = run(root, freeze="wav2vec2", stages=[running.stage(epochs=2)], cache="auto")
    (started,) = running.events(kept, StageStarted)
    assert started.frozen.startswith("replays")
    losses = [[event.loss for event in running.events(happened, Step)] for happened in (plain, kept)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    judged = [[event.metrics for event in running.events(happened, Evaluated)] for happened in (plain, kept)]
    assert judged[1][-1] == pytest.approx(judged[0][-1], rel=1e-5)


def test_what_is_read_leaves_padding_out(tmp_path: Path) -> None:
    save(tmp_path)
    read = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path).decode
    ids = torch.tensor([[5, 5, 0, 5, 6, 4, 7], [6, 6, 7, 7, 7, 7, 7]])
    outputs = SimpleNamespace(logits=torch.nn.functional.one_hot(ids, 8).float(), frames=torch.tensor([7, 2]))
    assert TASK.answers(outputs, {"read": read, "texts": ["AAB C", "B"]}) == (["AAB C", "B"], ["AAB C", "B"])


# Refusals


@pytest.mark.parametrize(
    ("taught", "task", "told"),
    [
        ("ab", {}, "doesn't know a b, which 1 of 12 train transcripts hold; write `case: upper`"),
        ("A, B!", {"case": "upper"}, "doesn't know ! ,, which 1 of 12 train transcripts hold; list in `chars_to_ign"),
        ("!!", {"chars_to_ignore": "!"}, "a transcript of train, `!!`, has nothing left in it; ignore fewer"),
    ],
)
def test_transcripts_that_do_not_fit_are_refused(tmp_path: Path, taught: str, task: dict[str, Any], told: str) -> None:
    texts = [said(index) for index in range(12)]
    write(tmp_path, "train", texts, 0, [*texts[:-1], taught])
    write(tmp_path, "validation", texts[:4], 50)
    save(tmp_path / "model")
    with pytest.raises(PlanError) as caught:
        run(tmp_path, task={"type": "automatic-speech-recognition", **task})
    assert told in caught.value.problems[0].sentence


def test_what_nobody_hears_is_left_out() -> None:
    task = AutomaticSpeechRecognition(type="automatic-speech-recognition", case="upper", chars_to_ignore=",!")
    assert task._written(" a,  b!c ") == "A BC"


def test_transcript_too_long_for_its_recording_stops_the_run(tmp_path: Path) -> None:
    texts = [said(index) for index in range(12)]
    write(tmp_path, "train", texts, 0, [*texts[:-1], "ABC" * 60])
    write(tmp_path, "validation", texts[:4], 50)
    save(tmp_path / "model")
    sentence, code, _ = running.stopped(tmp_path, task="automatic-speech-recognition")
    assert sentence.startswith("`ABCABC")
    assert "is too long for its recording, of which the model hears" in sentence
    assert code == 5


def test_recording_beyond_the_limit_is_refused(root: Path) -> None:
    task = {"type": "automatic-speech-recognition", "max_length_seconds": 0.3}
    with pytest.raises(PlanError, match=r"the recording lasts 0\.\d s, and the most is 0\.3 s; raise the limit"):
        data.read(load.load(running.recipe(root, task=task)).recipe, root)


# Edits


def recursive(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    """The definition, word for word."""
    if not one or not two:
        return len(one) + len(two)
    same = recursive(one[1:], two[1:]) + (one[0] != two[0])
    return min(same, recursive(one[1:], two) + 1, recursive(one, two[1:]) + 1)


sequences = some.lists(some.integers(0, 2), max_size=5).map(tuple)


@examples(max_examples=150, deadline=None)
@given(sequences, sequences)
def test_edits_are_the_fewest(one: tuple[int, ...], two: tuple[int, ...]) -> None:
    assert edits(one, two) == recursive(one, two)


def test_rates_are_over_all_words() -> None:
    given_, true = [["a"], ["b", "c", "d"]], [["a", "x"], ["b", "c", "d", "e", "f", "g"]]
    assert error_rate(given_, true) == pytest.approx(4 / 8)
    assert np.isnan(error_rate([["a"]], [[]]))
    assert TASK.score(["A B"], ["A BC"], ("wer", "cer"), Facts()) == {"wer": 0.5, "cer": 0.25}
