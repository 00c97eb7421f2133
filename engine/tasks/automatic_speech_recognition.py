"""Speech recognition: what is said in a recording, letter by letter (CTC; Graves et al. 2006).

Letters are those of the model's own tokenizer: a letter it doesn't know is refused and never taught as unknown. What
is judged is the likeliest letter of each frame, repeats and blanks left out; nothing searches, and no language model
helps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from engine.errors import PlanError, Problem, RunError
from engine.tasks import sounds
from engine.tasks.base import Example, Facts, Table, Task
from engine.tasks.columns import not_text, stop_at
from engine.tasks.edits import error_rate
from engine.tasks.files import not_files
from engine.tasks.texts import IGNORED

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

TEXTS, READ = "texts", "read"
"""What a batch carries for `answers` alone: the transcripts, and the function that makes text of ids."""


class AutomaticSpeechRecognition(Task):
    """The words that are said in a recording."""

    auto = "AutoModelForCTC"
    processor = "AutoProcessor"
    columns = {
        "audio": ("audio", "sound", "speech", "file"),
        "text": ("text", "transcription", "transcript", "sentence", "normalized_text"),
    }
    encoded_once = False
    smooths = False
    own_metrics = ("wer", "cer")

    type: Literal["automatic-speech-recognition"]
    case: Literal["upper", "lower"] | None = None
    """Case that transcripts are turned into, for a model that knows only one; they stay as they are if left out."""
    chars_to_ignore: str = ""
    """Characters that are taken out of the transcripts: marks that nobody hears."""
    max_length_seconds: Annotated[float, Field(gt=0.1)] | None = None
    """Longest recording; a longer one is refused, for its transcript can't be cut. No limit if left out."""

    def facts(self, tables: Mapping[str, Table]) -> Facts:
        stop_at(not_files(table, "audio", "recordings") for table in tables.values())
        stop_at(not_text(table, "text") for table in tables.values())
        stop_at(self._too_long(table) for table in tables.values())
        # The sum over a transcript would weigh long ones more, and its sum over a batch would grow with the batch.
        return Facts(settings={"ctc_loss_reduction": "mean"})

    def _too_long(self, table: Table) -> Problem | None:
        most = self.max_length_seconds
        for index, file in enumerate(table.columns["audio"] if most else ()):
            if most and (seconds := sounds.seconds(file.as_py())) > most:
                what = f"{table.row(index)}: the recording lasts {seconds:.1f} s, and the most is {most:g} s"
                return Problem(("task", "max_length_seconds"), what, "raise the limit or leave the row out")
        return None

    def fit(self, splits: Mapping[str, Dataset], processor: Any) -> None:
        """Refuse transcripts with letters that the tokenizer doesn't know, or with none that it does."""
        tokenizer = processor.tokenizer
        for name, rows in splits.items():
            written = [self._written(text) for text in rows["text"]]
            if "" in written:
                what = f"a transcript of {name}, `{rows['text'][written.index('')][:60]}`, has nothing left in it"
                raise PlanError([Problem(("task", "chars_to_ignore"), what, "ignore fewer characters")])
            letters = sorted(set("".join(written)))
            unknown = [letter for letter in letters if _unknown(letter, tokenizer)]
            if unknown:
                count = sum(bool(set(text) & set(unknown)) for text in written)
                raise PlanError([self._unread(name, unknown, count, len(written), tokenizer)])

    def _unread(self, name: str, unknown: list[str], count: int, total: int, tokenizer: Any) -> Problem:
        shown = " ".join(unknown[:12]) + (" ..." if len(unknown) > 12 else "")
        what = f"the model's tokenizer doesn't know {shown}, which {count:,} of {total:,} {name} transcripts hold"
        for case, turned in (("upper", str.upper), ("lower", str.lower)):
            if not any(_unknown(turned(letter), tokenizer) for letter in unknown):
                return Problem(("task", "case"), what, f"write `case: {case}`")
        return Problem(("task", "chars_to_ignore"), what, "list in `chars_to_ignore` what nobody hears")

    def _written(self, text: str) -> str:
        """A transcript as it is taught: in one case, without what is ignored, single blanks between words."""
        kept = "".join(letter for letter in text if letter not in self.chars_to_ignore)
        turned = {"upper": kept.upper(), "lower": kept.lower()}.get(self.case or "", kept)
        return " ".join(turned.split())

    def encode(self, rows: Mapping[str, Sequence[Any]], processor: Any, facts: Facts) -> dict[str, list[Any]]:
        """The extractor's first input of each recording, unpadded, the ids of its transcript, and the transcript."""
        extractor, written = processor.feature_extractor, [self._written(text) for text in rows["text"]]
        rate, name = extractor.sampling_rate, extractor.model_input_names[0]
        heard = [sounds.read(value, rate) for value in rows["audio"]]
        made = [extractor(sound, sampling_rate=rate, return_tensors="np")[name][0] for sound in heard]
        return {name: made, "labels": processor.tokenizer(written)["input_ids"], TEXTS: written}

    def collate(self, processor: Any) -> Callable[[Sequence[Example]], Mapping[str, Any]]:
        import torch

        def batch(examples: Sequence[Example]) -> dict[str, Any]:
            ids = [torch.tensor(example["labels"]) for example in examples]
            labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED)
            padded = sounds.pad(processor.feature_extractor, examples)
            kept = {TEXTS: [example[TEXTS] for example in examples], READ: processor.tokenizer.decode}
            return {**padded, "labels": labels, **kept}

        return batch

    def inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: value for name, value in batch.items() if name not in (TEXTS, READ)}

    def forward(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Outputs with the number of frames of each recording; raises `RunError` where one has too few."""
        frames = _frames(getattr(model, "module", model), batch)
        _refuse_short(frames, batch)
        outputs = model(**self.inputs(batch))
        outputs["frames"] = frames
        return outputs

    def weight(self, batch: Mapping[str, Any]) -> int:
        return len(batch["labels"])

    def answers(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The text that is read from each recording, padding left out, and its transcript."""
        likeliest = outputs.logits.argmax(-1).cpu()
        read = [batch[READ](ids[:count]) for ids, count in zip(likeliest, outputs.frames.tolist(), strict=True)]
        return read, batch[TEXTS]

    def score(
        self, predictions: Sequence[Any], references: Sequence[Any], names: Sequence[str], facts: Facts
    ) -> dict[str, float]:
        """Word and character error rate over the whole split."""
        parts = {"wer": str.split, "cer": list}
        return {
            name: error_rate([parts[name](text) for text in predictions], [parts[name](text) for text in references])
            for name in names
        }


def _unknown(text: str, tokenizer: Any) -> bool:
    return tokenizer.unk_token_id in tokenizer(text)["input_ids"]


def _frames(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Frames that the model makes of each recording (recordings,)."""
    import torch

    inputs = batch[model.main_input_name]
    mask = batch.get("attention_mask")
    lengths = torch.full((len(inputs),), inputs.shape[1], device=inputs.device) if mask is None else mask.sum(-1)
    return model._get_feat_extract_output_lengths(lengths).to(torch.long)


def _refuse_short(frames: torch.Tensor, batch: Mapping[str, Any]) -> None:
    """Raise `RunError` for a transcript that no path through its recording spells: its loss would be infinite."""
    labels = batch["labels"]
    same = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != IGNORED)  # a blank has to stand between equal letters
    short = (labels != IGNORED).sum(-1) + same.sum(-1) > frames
    if short.any():
        index = int(short.nonzero()[0])
        said = f"`{batch[TEXTS][index][:80]}` is too long for its recording, of which the model hears {frames[index]}"
        raise RunError(f"{said} frames; correct the transcript or leave the row out")
