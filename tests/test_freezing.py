"""Frozen means frozen: flags, modes and bits as truth tables; and micro-batches that are the same on any device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import senses
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from engine import freezing
from engine.errors import RunError
from engine.keeping import proof
from engine.rows.batches import Batching, batching

ALL = tuple(name for name, _ in tiny.resnet().named_parameters())
STAGES = ("embedder", "stages.0", "stages.1", "stages.2", "stages.3", "classifier")


def parts(*open_ones: str) -> frozenset[str]:
    """The parameters of the parts that are open."""
    return frozenset(name for name in ALL if any(f".{part}." in f".{name}" for part in open_ones))


# Flags and modes


@pytest.mark.parametrize(
    "open_ones",
    [(), ("classifier",), ("stages.3", "classifier"), ("embedder",), ("stages.1",), STAGES],
)
def test_what_is_open_trains_and_what_is_frozen_stays_in_eval_mode(open_ones: tuple[str, ...]) -> None:
    model = tiny.resnet()
    freezing.obey(model, parts(*open_ones))
    freezing.train_mode(model)
    assert set(freezing.trainable(model)) == parts(*open_ones)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        assert norm.training is any(f".{part}." in f".{name}." for part in open_ones), name
    counted = {
        f"{name}.{buffer}" for name, norm in norms.items() if norm.training for buffer, _ in norm.named_buffers()
    }
    assert freezing.movable(model) == parts(*open_ones) | counted


def test_module_without_parameters_goes_with_its_parent() -> None:
    model = tiny.bert()
    freezing.obey(model, {name for name in freezing.parameters(model) if "layer.3" in name})
    freezing.train_mode(model)
    dropouts = {name: module.training for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    blocks = {name: mode for name, mode in dropouts.items() if "encoder.layer." in name}
    assert {name for name, mode in blocks.items() if mode} == {name for name in blocks if "layer.3" in name}
    assert not dropouts["bert.embeddings.dropout"]
    assert dropouts["dropout"], "the head's dropout belongs to the model as a whole, part of which trains"


def test_obeying_leaves_no_gradient_and_trains_in_float32() -> None:
    model = tiny.resnet().bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    freezing.obey(model, parts("classifier"))
    assert all(parameter.grad is None for parameter in model.parameters())
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == parts("classifier")


def test_obeying_an_unknown_name_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"the model has no parameter classifier\.1\.wieght"):
        freezing.obey(tiny.resnet(), {"classifier.1.wieght"})


def test_flags_and_modes_come_back_whatever_happens() -> None:
    model = tiny.resnet()
    freezing.obey(model, parts("stages.3", "classifier"))
    freezing.train_mode(model)
    modes = [module.training for module in model.modules()]
    for inside in (freezing.all_trainable(model), freezing.eval_mode(model)):
        with pytest.raises(ZeroDivisionError), inside:
            raise ZeroDivisionError
    assert set(freezing.trainable(model)) == parts("stages.3", "classifier")
    assert [module.training for module in model.modules()] == modes
    with freezing.eval_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# Proof


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), False),
        (torch.tensor([1]), torch.tensor([1], dtype=torch.int32), False),
        (torch.tensor(0.0), torch.tensor(0.0, dtype=torch.bfloat16), False),
        (torch.ones(2, 3).t(), torch.ones(3, 2), True),
        (torch.zeros(0, 3), torch.zeros(3, 0), False),
    ],
)
def test_a_digest_is_type_shape_and_bits(one: torch.Tensor, other: torch.Tensor, same: bool) -> None:
    assert (proof.digest(one) == proof.digest(other)) is same


PIXELS = torch.linspace(-1, 1, 4 * 3 * tiny.IMAGE**2).reshape(4, 3, tiny.IMAGE, tiny.IMAGE)
LABELS = torch.tensor([0, 1, 1, 0])
Losses = Callable[[nn.Module], torch.Tensor]


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(PIXELS, labels=LABELS).loss


def watched(loss: Losses = loss_of, held: str = "") -> nn.Module:
    """The canary in a ResNet whose upper half trains; `held` is a parameter that its optimizer lacks."""
    model = tiny.resnet()
    freezing.obey(model, parts("stages.3", "classifier"))
    freezing.train_mode(model)
    named = [(name, value) for name, value in freezing.trainable(model).items() if name != held]
    proof.canary(model, torch.optim.AdamW(named, lr=0.1), lambda: loss(model), "top")
    return model


def test_canary_leaves_everything_as_it_was() -> None:
    """Two steps at a rate of 0.1, and running statistics that count: all of it is put back."""
    model = watched()
    assert proof.digests(model) == proof.digests(tiny.resnet())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("loss", "held", "said"),
    [
        (lambda model: loss_of(model) * float("nan"), "", "stage `top`: the very first loss is nan"),
        (lambda model: loss_of(model) / 0, "", "stage `top`: the very first loss is inf"),
        (loss_of, "classifier.1.bias", "the optimizer and the model disagree about `classifier.1.bias`"),
        (lambda model: loss_of(model) * 0, "", "the loss gives no gradient to `classifier.1.bias` and "),
        (lambda model: model.classifier[1].bias.sum(), "", "should train, but the loss doesn't depend on it"),
        (
            lambda model: (model.classifier[1].weight * 0).sqrt().sum() + loss_of(model),
            "",
            "the very first gradient of `classifier.1.weight` is not finite",
        ),
    ],
)
def test_canary_stops_a_stage_that_could_not_train(loss: Losses, held: str, said: str) -> None:
    with pytest.raises(RunError) as caught:
        watched(loss, held)
    assert said in str(caught.value)
    assert caught.value.exit_code == 5


def test_canary_counts_layers_that_are_left_out_at_random() -> None:
    """wav2vec 2.0 leaves nearly every layer out here; each trains all the same, and none is left out for the trial."""
    model = senses.wav2vec2(layerdrop=0.99, mask_time_prob=0.0)
    freezing.obey(model, frozenset(name for name, _ in model.named_parameters() if "encoder.layers" in name))
    freezing.train_mode(model)
    sound = torch.linspace(-1, 1, 4_000).sin().repeat(2, 1)
    optimizer = torch.optim.AdamW(list(freezing.trainable(model).items()), lr=0.1)
    proof.canary(model, optimizer, lambda: model(sound, labels=torch.tensor([0, 1])).loss, "top")
    assert model.config.layerdrop == 0.99


def test_canary_sees_a_frozen_tensor_move() -> None:
    def moving(model: nn.Module) -> torch.Tensor:
        model.resnet.embedder.embedder.normalization.running_mean.add_(1)
        return loss_of(model)

    name = "resnet.embedder.embedder.normalization.running_mean"
    with pytest.raises(RunError, match=f"stage `top`: a trial step moved `{name}`, which is frozen"):
        watched(moving)


def test_comparison(tmp_path: Path) -> None:
    """Names to bits: before, after, and what is in the file; then what may move and what trained."""
    tensors = {name: torch.full((2,), float(index)) for index, name in enumerate("abcd")}
    bits = {name: proof.digest(tensor) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    before = {"w": bits["a"], "v": bits["a"], "frozen": bits["b"]}
    after = {"w": bits["c"], "v": bits["a"], "frozen": bits["b"]}
    proved = proof.compare(before, after, {"w", "v"}, {"w", "v"}, tmp_path)
    assert (proved.moved, proved.still, proved.unmoved) == (1, 1, ("v",))
    with pytest.raises(RunError, match="the run moved `w`, which is frozen"):
        proof.compare(before, after, {"v"}, {"v"}, tmp_path)
    with pytest.raises(RunError, match="nothing that trained has moved"):
        proof.compare(before, before, {"w"}, {"w"}, tmp_path)
    lost = after | {"w": proof.digest(torch.full((2,), 9.0))}
    with pytest.raises(RunError, match="the saved model doesn't hold `w` as the run ended"):
        proof.compare(before, lost, {"w", "v"}, {"w", "v"}, tmp_path)


# Micro-batches

SIZES = st.integers(1, 40)


@given(batch=SIZES, ceiling=st.one_of(st.none(), SIZES), processes=st.integers(1, 5), last=st.integers(1, 40))
def test_every_example_of_a_step_counts_once(batch: int, ceiling: int | None, processes: int, last: int) -> None:
    spread = batching(batch, ceiling, processes)
    indices = list(range(100, 100 + min(last, batch)))
    shares = [spread.share(indices, rank) for rank in range(processes)]
    assert {len(share) for share in shares} == {spread.accumulation}
    counted = [index for share in shares for micro in share if micro.counts for index in micro.indices]
    assert sorted(counted) == indices
    assert all(1 <= len(micro.indices) <= spread.micro for share in shares for micro in share)
    assert ceiling is None or spread.micro <= ceiling


@given(batch=SIZES, micro=st.integers(1, 10), processes=st.integers(2, 5))
def test_micro_batches_are_the_same_on_any_number_of_processes(batch: int, micro: int, processes: int) -> None:
    indices = list(range(batch))
    alone = {m.number: m.indices for m in Batching(batch, micro, 1).share(indices, 0)}
    spread = Batching(batch, micro, processes)
    shares = [spread.share(indices, rank) for rank in range(processes)]
    assert {m.number: m.indices for share in shares for m in share if m.counts} == alone


@given(batch=SIZES, micro=SIZES, processes=st.integers(1, 5))
def test_halving_ends_at_one_and_keeps_the_batch(batch: int, micro: int, processes: int) -> None:
    spread = Batching(batch, micro, processes)
    while spread.micro > 1:
        smaller = spread.halved()
        assert smaller.micro == spread.micro // 2
        assert smaller.batch_size == batch
        spread = smaller
    assert spread.halved() == spread


def test_the_arithmetic_in_words() -> None:
    assert batching(32, 4, 2).reason == "32 examples a step = 2 x 4 x 4 (devices x accumulation x micro-batch)"
