"""One split's frozen prefix: captured once, found again, never trusted where it isn't the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_frostline import only, staged
from torch import Tensor, nn

from engine.frost import capturing, prefix
from engine.frost.prefix import Cache, Prefix
from engine.frost.replay import Line
from engine.frostline import Refusal, find
from engine.store import usage

COUNT = 60


class Texts:
    """Token sequences of 3 to 30 tokens with whatever labels a task needs."""

    def __init__(self, labels: str = "classes", count: int = COUNT, seed: int = 0, calls: list[int] | None = None):
        draw = np.random.default_rng(seed)
        self.rows = [self._row(draw, labels) for _ in range(count)]
        self.lengths = np.array([len(row["input_ids"]) for row in self.rows])
        self.fingerprint = f"{labels} {count} {seed}"

    def _row(self, draw: np.random.Generator, labels: str) -> dict[str, Any]:
        row: dict[str, Any] = {"input_ids": draw.integers(5, 90, draw.integers(3, 31)).tolist()}
        length = len(row["input_ids"])
        if labels == "language":
            row["labels"] = row["input_ids"]
        elif labels == "pairs":
            row["labels"] = draw.integers(5, 90, draw.integers(2, 12)).tolist()
        elif labels == "spans":
            row |= {"start_positions": int(draw.integers(length)), "end_positions": length - 1}
        else:
            row["labels"] = int(draw.integers(2))
        return row

    def __len__(self) -> int:
        return len(self.rows)

    def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self.rows[index] for index in indices]


def collated(examples: Sequence[dict[str, Any]], left: bool = False, multiple: int = 1) -> dict[str, Tensor]:
    """A padded batch."""
    batch = {}
    masked = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
    for key in masked[0]:
        values = [example[key] for example in masked]
        if isinstance(values[0], list):
            width = -(-max(map(len, values)) // multiple) * multiple
            fill = -100 if key == "labels" else 0
            pads = [[fill] * (width - len(value)) for value in values]
            values = [pad + value if left else value + pad for value, pad in zip(values, pads, strict=True)]
        batch[key] = torch.tensor(values)
    return batch


def line_of(model: nn.Module, source: Any, collate: Callable[..., Any] = collated) -> Line:
    line = find(model, collate(source.examples([0, 1])))
    assert isinstance(line, Line), line
    return line


def opened(line: Line, source: Any, folder: Path, collate: Callable[..., Any] = collated, **more: Any) -> Prefix:
    found = Prefix.open(line, source, collate, Cache(folder, batch_size=8, **more))
    assert isinstance(found, Prefix), found
    return found


def refused(line: Line, source: Any, folder: Path, collate: Callable[..., Any] = collated, **more: Any) -> str:
    found = Prefix.open(line, source, collate, Cache(folder, batch_size=8, **more))
    assert isinstance(found, Refusal)
    return found.reason


def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the pass that captures, as they come."""
    seen: list[int] = []
    groups = capturing.groups

    def counting(*args: Any) -> Iterator[Any]:
        for group in groups(*args):
            seen.append(len(group[0]))
            yield group

    monkeypatch.setattr(capturing, "groups", counting)
    return seen


@pytest.mark.parametrize(
    ("name", "stage", "labels", "kinds", "together"),
    [
        ("Bert cls", "head", "classes", ("fixed",), True),
        ("Bert cls", "half", "classes", ("tokens",), True),
        ("Bert tokens", "last", "language", ("tokens",), True),
        ("DebertaV2 cls", "last", "classes", ("tokens",), True),
        ("GPT2 lm", "last", "language", ("tokens",), True),
        ("Llama lm", "half", "language", ("tokens",), True),
        ("T5 s2s", "last", "pairs", ("tokens", "other"), False),
        ("Bart s2s", "half", "pairs", ("tokens",), False),
    ],
)
def test_every_example_is_captured_once_and_any_batch_of_them_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str, labels: str, kinds: tuple[str, ...],
    together: bool,
):  # fmt: skip
    source = Texts(labels)
    if labels == "language" and "Bert" in name:
        for row in source.rows:
            row["labels"] = [token % 2 for token in row["input_ids"]]
    model, _ = staged(name, stage)
    line = line_of(model, source)
    seen = captures(monkeypatch)
    found = opened(line, source, tmp_path / "c")
    assert sum(seen) == COUNT
    assert (len(seen) <= -(-COUNT // 8) + 1) == together  # neighbours in length share a pass
    assert found.survey.kinds == kinds
    assert found.difference.within(5e-6)
    indices = [5, 44, 2, 17, 31]
    batch = collated(source.examples(indices), multiple=8)
    with torch.no_grad():
        full = model(**batch).loss
        with line.replaying():
            found.feed(indices, batch)
            assert model(**batch).loss.item() == pytest.approx(full.item(), rel=2e-6)


def test_pictures_have_no_length(tmp_path: Path):
    class Pictures:
        lengths, fingerprint = None, "pictures"

        def __len__(self) -> int:
            return 10

        def examples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
            make = torch.Generator
            return [
                {"pixel_values": torch.randn(3, 32, 32, generator=make().manual_seed(i)), "labels": i % 2}
                for i in indices
            ]

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.stack([torch.as_tensor(each[key]) for each in examples]) for key in examples[0]}

    for name in ("ViT cls", "ResNet cls"):
        model, _ = staged(name, "last")
        found = opened(line_of(model, Pictures(), collate), Pictures(), tmp_path / "c", collate)
        assert found.difference.within(5e-6)
        assert found.survey.mixes is False


def test_left_padded_texts(tmp_path: Path):
    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collated(examples, left=True)
        first = batch["attention_mask"].argmax(1)
        batch["labels"][torch.arange(len(first)), first] = -100  # what a pad predicts
        return batch

    source = Texts("language")
    model, _ = staged("Llama lm", "half")
    assert opened(line_of(model, source, collate), source, tmp_path / "c", collate).difference.within(5e-6)


def test_positions_that_padding_shifts_are_noticed(tmp_path: Path):
    """A GPT-2 counts positions from the first pad, so an example alone isn't what it is in a batch."""

    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return collated(examples, left=True)

    source = Texts("language")
    model, _ = staged("GPT2 lm", "half")
    assert "a replay is off by" in refused(line_of(model, source, collate), source, tmp_path / "c", collate)


def test_a_loss_that_reads_padding_is_noticed(tmp_path: Path):
    source = Texts("spans")
    model, _ = staged("Bert answers", "half")
    assert "the model looks at padding" in refused(line_of(model, source), source, tmp_path / "c")


def test_it_is_found_again_until_something_below_the_line_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Texts()
    model, _ = staged("Bert cls", "half")
    seen = captures(monkeypatch)

    def again(text: Any = source, **more: Any) -> bool:
        """Whether nothing was captured."""
        before = len(seen)
        opened(line_of(model, text), text, tmp_path / "c", **more)
        return len(seen) == before

    assert not again()
    assert again()
    with torch.no_grad():
        model.classifier.weight += 1
        model.bert.encoder.layer[3].output.dense.weight += 1
    assert again()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    assert not again()
    model.config.layer_norm_eps = 1e-6
    assert not again()
    assert again(dtype="float16")  # what is kept already is more exact
    assert not again(Texts(seed=2), dtype="float16")
    assert again(Texts(seed=2), dtype="float16")
    assert not again(Texts(seed=1))
    only(model, "bert.encoder.layer.3", "classifier")
    assert not again()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_types_take_less_and_stay_close(tmp_path: Path, dtype: Any):
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    full = opened(line, source, tmp_path / "full")
    small = opened(line, source, tmp_path / "small", dtype=dtype)
    assert small.size < (0.56 if dtype != "int8" else 0.35) * full.size
    assert 0 < small.difference.loss < 1e-3
    assert 0 < small.difference.gradient < 0.1


def test_values_beyond_float16_are_kept_as_float32(tmp_path: Path):
    source = Texts("language")
    model, _ = staged("Llama lm", "half")
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e7
    found = opened(line_of(model, source), source, tmp_path / "c", dtype="float16")
    assert {store.dtype for store in found.stores} == {"float32"}
    assert found.difference.within(5e-6)


def test_what_is_drawn_at_random_is_refused(tmp_path: Path):
    def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collated(examples)
        return batch | {"input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.5, 3, batch["input_ids"])}

    source = Texts()
    model, _ = staged("Bert cls", "last")
    assert "augmentation or masking" in refused(line_of(model, source, collate), source, tmp_path / "c", collate)
    assert not (tmp_path / "c").exists()


def test_the_budget_is_kept(tmp_path: Path):
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    reason = refused(line, source, tmp_path / "c", budget=10_000)
    assert "GB" in reason
    size = opened(line, source, tmp_path / "c").size
    estimate = float(np.sum(opened(line, source, tmp_path / "c").survey.elements)) * 4 * COUNT
    assert estimate == pytest.approx(size, rel=0.1)
    other = Texts(seed=1)
    opened(line, other, tmp_path / "c", budget=int(1.3 * size))
    assert usage(tmp_path / "c") < 1.3 * size


def test_a_full_disk_is_a_refusal_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.store._Sealed.write", full)
    assert "No space left" in refused(line, source, tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_stages_share_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Texts()
    model, _ = staged("Bert cls", "head")
    lines = []
    for count in range(3):
        blocks = [f"bert.encoder.layer.{3 - block}" for block in range(count)]
        only(model, "classifier", "bert.pooler", *blocks)
        lines.append(line_of(model, source))
    only(model, "classifier", "bert.pooler")
    seen = captures(monkeypatch)
    together = Prefix.open_all(lines, source, collated, Cache(tmp_path / "c", batch_size=8))
    assert sum(seen) == COUNT
    assert [line.cuts for line in lines] == [(f"bert.encoder.layer.{3 - block}",) for block in range(3)]
    for line, found in zip(lines, together, strict=True):
        assert isinstance(found, Prefix)
        alone = opened(line, source, tmp_path / "c")
        assert [store.path for store in alone.stores] == [store.path for store in found.stores]
    assert sum(seen) == COUNT


def test_devices_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Device 0 waits; meanwhile device 1 does its share; then each reads what the other has."""
    monkeypatch.setattr(prefix, "SHARD", 16)
    source, shares, told = Texts(), [], []
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    seen = captures(monkeypatch)

    def other() -> None:
        shares.append(sum(seen))
        opened(line, source, tmp_path / "c", rank=1, world=2, wait=lambda: shares.append(sum(seen)))

    found = opened(line, source, tmp_path / "c", rank=0, world=2, wait=other, progress=lambda *n: told.append(n))
    assert shares == [30, 60]
    assert sum(seen) == COUNT
    assert len(found.stores) == 4
    assert told[-1] == (30, 30)
    assert found.difference.within(5e-6)


def test_a_killed_pass_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix, "SHARD", 16)
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    seen = captures(monkeypatch)

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(line, source, tmp_path / "c", progress=interrupt)
    assert len(list((tmp_path / "c").iterdir())) == 1
    before = sum(seen)
    opened(line, source, tmp_path / "c")
    assert sum(seen) - before == COUNT - 15


def test_a_damaged_shard_is_captured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    first = opened(line, source, tmp_path / "c")
    path = first.stores[0].path / "cut0.rows"
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.unlink()
    path.write_bytes(content)
    seen = captures(monkeypatch)
    again = opened(line, source, tmp_path / "c")
    assert sum(seen) == COUNT
    assert all(torch.equal(first.stores[0].row(0, i), again.stores[0].row(0, i)) for i in range(COUNT))


def test_an_empty_split_is_refused(tmp_path: Path):
    source = Texts()
    model, _ = staged("Bert cls", "last")
    line = line_of(model, source)
    assert refused(line, Texts(count=0), tmp_path / "c") == "there are no examples"


@pytest.mark.parametrize(("lengths", "passes"), [([10] * 60, 2), ([60] * 20, 3), ([600] * 6, 2), ([50, 51, 52, 60], 2)])
def test_a_processor_takes_what_its_cache_has_room_for(lengths: list[int], passes: int):
    """51 tokens of 10, 8 of 60, 4 of any length; one that is much longer waits for its like."""
    source = Texts()
    source.lengths = np.array(lengths)
    fits = capturing.room(source, 64, processor=True)
    found = list(capturing._neighbours(source, list(range(len(lengths))), fits))
    assert len(found) == passes
    assert [index for group in found for index in group] == list(range(len(lengths)))
    assert capturing.room(source, 64, processor=False)(0) == 64


def test_rows_of_one_shape_are_gathered_at_once(tmp_path: Path):
    source = Texts()
    model, _ = staged("Bert cls", "head")
    kept = opened(line_of(model, source), source, tmp_path / "c")
    some = [5, 0, 41, 5]
    assert isinstance(kept.stores[0].rows(0, some), Tensor)
    (found,) = kept.tensors(some, collated(source.examples(some)))
    assert torch.equal(found, torch.stack([kept.stores[0].row(0, index) for index in some]))
