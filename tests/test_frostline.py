"""The frost line of many models: replay equals recomputation to the bit, and where it can't, there is a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, STAGES, TEXT, Family, classes, language, numbers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from engine import freezing
from engine.errors import RunError
from engine.frost.replay import Line, fit
from engine.frostline import Difference, Refusal, find, verify
from engine.store import padded

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared, and the order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def first(batch: Mapping[str, Any], count: int = 2) -> dict[str, Any]:
    """The first examples of a batch."""
    return {key: value[:count] if isinstance(value, Tensor) else value for key, value in batch.items()}


def line_of(model: nn.Module, batch: Mapping[str, Any]) -> Line:
    line = find(model, first(batch))
    assert isinstance(line, Line), line
    return line


def staged(name: str, stage: str) -> tuple[nn.Module, dict[str, Any]]:
    family = BY_NAME[name]
    model = family.model()
    family.train(model, stage)
    return model, family.batch()


def cases(choose: Callable[[Family, str], Any]) -> list[Any]:
    return [
        pytest.param(family, stage, id=f"{family.name}-{stage}", marks=[pytest.mark.slow] if family.slow else [])
        for family in FAMILIES
        for stage in STAGES
        if choose(family, stage)
    ]


@pytest.mark.parametrize(("family", "stage"), cases(lambda family, stage: stage not in family.refused))
def test_replay_is_equal_to_the_bit(family: Family, stage: str):
    model = family.model()
    family.train(model, stage)
    batch = family.batch()
    model(**batch)
    before = attached(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    line = line_of(model, batch)
    assert verify(model, line, batch, line.capture(batch)) == Difference(0.0, 0.0)
    assert line.saved >= 0.1
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before == attached(model)


def attached(model: nn.Module) -> tuple[int, int]:
    """Forwards of instances and hooks; some of transformers' own hooks stay after a model's first forward pass."""
    modules = list(model.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return sum("forward" in module.__dict__ for module in modules), hooks


@pytest.mark.parametrize(
    ("family", "stage"), cases(lambda family, stage: family.ragged and stage not in family.refused)
)
def test_rows_captured_alone_and_padded_again_are_equal_but_for_rounding(family: Family, stage: str):
    model = family.model()
    family.train(model, stage)
    batch = family.batch()
    line = line_of(model, batch)
    alone = [line.capture(trimmed(batch, index)) for index in range(len(batch["input_ids"]))]
    rows = [padded([each[slot][0] for each in alone]) for slot in range(len(line.cuts))]
    assert verify(model, line, batch, rows).within(2e-6)


def trimmed(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One example without padding."""
    length, width = int(batch["attention_mask"][index].sum()), batch["attention_mask"].shape[1]
    one = {key: value[index : index + 1] for key, value in batch.items()}
    return {key: value[:, :length] if value.shape[1:] == (width,) else value for key, value in one.items()}


@pytest.mark.parametrize(("family", "stage"), cases(lambda family, stage: stage in family.refused))
def test_refused(family: Family, stage: str):
    model = family.model()
    family.train(model, stage)
    refusal = find(model, first(family.batch()))
    assert isinstance(refusal, Refusal)
    assert family.refused[stage] in refusal.reason


def bert(**settings: Any) -> nn.Module:
    return BY_NAME["Bert cls"].model() if not settings else _bert(settings)


def _bert(settings: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT | settings)).eval()


def only(model: nn.Module, *modules: str) -> nn.Module:
    """Train these modules or parameters and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"{name}.".startswith(f"{module}.") for module in modules))
    return model


def reason(model: nn.Module, batch: Mapping[str, Any] | None = None) -> str:
    refusal = find(model, first(batch or classes()))
    assert isinstance(refusal, Refusal)
    return refusal.reason


def test_reasons_why_there_is_no_line():
    assert reason(bert().requires_grad_(True)) == "everything trains"
    assert reason(bert().requires_grad_(False)) == "nothing trains"
    careless = reason(only(bert(), "bert.embeddings.LayerNorm", "classifier"))
    assert careless == "`bert.embeddings.LayerNorm` trains, so only 0% of the work lies below the frost line"
    biases = bert()
    only(biases, *(name for name, _ in biases.named_parameters() if name.endswith("bias")))
    assert "0%" in reason(biases)
    attentive = only(bert(), "classifier")
    attentive.config.output_hidden_states = True
    assert "output_hidden_states" in reason(attentive)


def test_a_batch_with_keys_and_values_is_refused():
    model, batch = staged("Llama lm", "last")
    batch["past_key_values"] = transformers.DynamicCache()
    assert "keys and values" in reason(model, batch)


def test_a_token_that_no_module_owns_a_call_of_counts_from_its_ancestor():
    model, batch = staged("ViT cls", "head")
    only(model, "vit.embeddings.cls_token", "classifier")
    assert "vit.embeddings" in reason(model, batch)


def test_the_line_of_a_stage_to_come_needs_names_only():
    model = only(bert(), "classifier")
    later = [name for name, _ in model.named_parameters() if name.startswith(("bert.encoder.layer.3.", "classifier"))]
    line = find(model, first(classes()), trainable=later)
    assert isinstance(line, Line)
    assert line.cuts == ("bert.encoder.layer.2",)


def test_one_row_is_kept_where_only_one_is_read():
    model, batch = staged("Bert cls", "head")
    line = line_of(model, batch)
    assert line.rows == (0,)
    assert line.capture(batch)[0].shape == (3, 1, 32)


def test_an_encoder_and_a_decoder_are_cut_separately():
    model, batch = staged("T5 s2s", "last")
    line = line_of(model, batch)
    assert line.cuts == ("encoder.final_layer_norm", "decoder.block.2")
    assert any("relative_attention_bias" in name for name in line.live)


class Early(nn.Module):
    """Reads the head's weight before the head runs, and hands a decision on that no gradient sees."""

    def __init__(self, reads_head: bool):
        super().__init__()
        torch.manual_seed(0)
        self.reads_head = reads_head
        self.body, self.more, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        low = self.body(x)
        if self.reads_head:
            low = nn.functional.linear(low, self.head.weight)
        high = self.more(low)
        if not self.reads_head:
            high = high * (low.sum(-1, keepdim=True) > 0)
        return {"loss": nn.functional.mse_loss(self.head(high), labels)}


def test_a_weight_read_before_its_module_runs_is_seen():
    model = only(Early(reads_head=True), "head")
    assert isinstance(find(model, {"x": torch.randn(2, 8), "labels": torch.zeros(2, 8)}), Refusal)


def test_what_no_gradient_sees_is_caught_by_the_check():
    model, batch = only(Early(reads_head=False), "head"), {"x": torch.randn(5, 8), "labels": torch.zeros(5, 8)}
    line = line_of(model, batch)
    assert not verify(model, line, batch, line.capture(batch)).within(1e-5)


def test_the_check_sees_wrong_rows_and_leaves_gradients_alone():
    model, batch = staged("Bert cls", "half")
    model(**batch).loss.backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    line = line_of(model, batch)
    rows = line.capture(batch)
    assert not verify(model, line, batch, [rows[0].flip(0)]).within(1e-5)
    after = [p.grad for p in model.parameters()]
    assert all(a is b if b is None else torch.equal(a, b) for a, b in zip(after, before, strict=True))


def adapted(layers: list[int] | None) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=layers, init_lora_weights=False)
    model = bert()
    inject_adapter_in_model(config, model)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "classifier" in name)
    return model.eval()


def test_adapters_everywhere_leave_no_line_and_on_top_they_do():
    assert "query.lora_A.default` trains, so only 3%" in reason(adapted(None))
    model = adapted([3])
    line = line_of(model, classes())
    assert line.cuts == ("bert.encoder.layer.2",)
    assert verify(model, line, classes(), line.capture(classes())) == Difference(0.0, 0.0)


def trajectory(model: nn.Module, line: Line, batch: Mapping[str, Any], steps: int, cached: bool) -> list[float]:
    """Losses of a few steps with dropout on above the line; the model is left as trained."""
    trained = list(freezing.trainable(model).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    rows, losses = line.capture(batch), []
    for step in range(steps):
        line.train_mode()
        torch.manual_seed(step)
        with line.replaying() if cached else line.recomputing():
            if cached:
                line.feed(rows)
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "name", ["Bert cls", "ResNet cls", "Bart s2s", "Wav2Vec2 cls", "GPT2 lm", "T5 s2s", "Roberta cls"]
)
def test_training_takes_the_same_course_cached_or_not(name: str):
    courses = []
    for cached in (False, True):
        model, batch = staged(name, "last")
        losses = trajectory(model, line_of(model, batch), batch, 6, cached)
        courses.append((losses, [tensor.clone() for tensor in model.state_dict().values()]))
    assert courses[0][0] == courses[1][0]
    assert len(set(courses[0][0])) == 6
    assert all(torch.equal(one, other) for one, other in zip(courses[0][1], courses[1][1], strict=True))


def test_layerdrop_never_drops_what_is_kept():
    """With the containers in train mode a BART drops the layer at the cut in 44 of 100 batches."""
    model, batch = staged("Bart s2s", "last")
    line = line_of(model, batch)
    line.train_mode()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    losses = set()
    with line.replaying(), torch.no_grad():
        rows = [torch.randn(3, 9, 32), torch.randn(3, 5, 32)]
        for seed in range(30):
            torch.manual_seed(seed)
            line.feed(rows)
            losses.add(model(**batch).loss.item())
    assert len(losses) == 1


def test_batch_norm_below_the_line_stands_still_and_above_it_counts():
    model, batch = staged("ResNet cls", "last")
    line = line_of(model, batch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    line.train_mode()
    with line.replaying():
        line.feed(line_rows := [torch.randn(3, 16, 2, 2)])
        model(**batch)
    assert line_rows
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved
    assert all(name.startswith("resnet.encoder.stages.3") for name in moved)


def test_spec_augment_draws_nothing_below_the_line():
    family = BY_NAME["Wav2Vec2 cls"]
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**{**family.settings, "mask_time_prob": 0.5, "mask_time_length": 2})
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    family.train(model, "last")
    line = line_of(model, family.batch())
    line.train_mode()
    assert not model.wav2vec2.training
    assert model.wav2vec2.encoder.layers[3].training


def test_reentrant_checkpointing_keeps_every_gradient():
    model, batch = staged("Llama lm", "half")
    line = line_of(model, batch)
    rows = line.capture(batch)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    line.train_mode()
    with line.replaying():
        line.feed(rows)
        model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in freezing.trainable(model).values())


def test_bfloat16_weights_replay_to_the_bit():
    model, batch = staged("Llama lm", "half")
    model.to(torch.bfloat16)
    line = line_of(model, batch)
    rows = line.capture(batch)
    assert rows[0].dtype == line.taps[0].dtype == torch.bfloat16
    assert verify(model, line, batch, rows) == Difference(0.0, 0.0)


def test_left_padding_is_exact_with_relative_positions():
    model, batch = staged("Llama lm", "half")
    batch = {key: value.flip(1) for key, value in batch.items()}
    batch["labels"][:, :-4] = -100
    line = line_of(model, batch)
    assert verify(model, line, batch, line.capture(batch)) == Difference(0.0, 0.0)


def replayed(line: Line) -> Callable[..., Any]:
    def forward(rows: list[Tensor] | None, **batch: Any) -> Any:
        with line.replaying():
            if rows is not None:
                line.feed(rows)
            return line.model(**batch)

    return forward


def test_what_a_replay_cant_answer_is_refused():
    model, batch = staged("Llama lm", "last")
    line = line_of(model, batch)
    rows, forward = line.capture(batch), replayed(line)
    with pytest.raises(RunError, match="fed nothing"):
        forward(None, **batch)
    with pytest.raises(RunError, match="output_hidden_states"):
        forward(rows, **batch, output_hidden_states=True)
    with pytest.raises(RunError, match="generat"):
        forward(rows, **batch, past_key_values=transformers.DynamicCache())
    with pytest.raises(RunError, match=r"shape \(2, 9, 32\), but this batch needs \(3, 9, 32\)"):
        forward([rows[0][:2]], **batch)
    with pytest.raises(RunError, match="1 cuts, but 2"):
        forward(rows * 2, **batch)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_rows_are_good_for_one_forward_pass():
    model, batch = staged("Bert cls", "last")
    line = line_of(model, batch)
    rows = line.capture(batch)
    with line.replaying():
        line.feed(rows)
        model(**batch)
        with pytest.raises(RunError, match="fed nothing"):
            model(**batch)
        with pytest.raises(RunError, match="can't be captured while it is replayed"):
            line.capture(batch)
        with pytest.raises(RunError, match="already"), line.replaying():
            pass


def test_generation_works_again_after_a_replay():
    model, batch = staged("Llama lm", "last")
    line = line_of(model, batch)
    prompt = {"input_ids": numbers(1, 4), "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    before = model.generate(**prompt)
    with line.replaying():
        line.feed([torch.zeros(1, 4, 32)])
        with pytest.raises(RunError, match="generat"):
            model.generate(**prompt)
    assert torch.equal(before, model.generate(**prompt))


@pytest.mark.parametrize("name", ["Llama lm", "T5 s2s"])
def test_generation_is_the_same_while_recomputing(name: str):
    model, batch = staged(name, "last")
    line = line_of(model, batch)
    prompt = {"input_ids": numbers(1, 4), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = model.generate(**prompt)
    with line.recomputing():
        assert torch.equal(before, model.generate(**prompt))


def test_a_dropout_on_both_sides_of_the_line_drops_above_it_only():
    """A T5 stack has one dropout, for its embeddings and for its last norm."""
    model, batch = staged("T5 s2s", "last")
    line = line_of(model, batch)
    dropout = model.decoder.dropout
    assert {module: (turns.recomputed, turns.replayed) for module, turns in line.shared.items()} == {dropout: (1, 1)}
    dropped: list[bool] = []
    dropout.register_forward_hook(lambda _module, args, output: dropped.append(not torch.equal(args[0], output)))
    line.train_mode()
    with line.recomputing():
        model(**batch)
    assert dropped == [False, True]


def test_a_cut_that_is_computed_live_has_its_output_replaced(monkeypatch: pytest.MonkeyPatch):
    """Where a shape can't be worked out without numbers, the module at the line runs and its output is replaced."""
    monkeypatch.setattr("engine.frost.replay.Stub.agrees", lambda stub, _call: not stub.makes_shapes)
    for name, stage in (("Segformer masks", "half"), ("ResNet cls", "head"), ("T5 s2s", "all but the first")):
        model, batch = staged(name, stage)
        line = line_of(model, batch)
        assert line.overrides
        assert verify(model, line, batch, line.capture(batch)) == Difference(0.0, 0.0)


def test_capture_leaves_modes_flags_and_randomness_alone():
    model, batch = staged("Bert cls", "half")
    line = line_of(model, batch)
    line.train_mode()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    line.capture(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_fit_pads_and_crops_one_axis_only():
    rows = torch.ones(2, 3, 4)
    assert fit(rows, (2, 5, 4), "x").sum() == rows.sum()
    assert fit(rows, (2, 2, 4), "x").shape == (2, 2, 4)
    for shape in ((3, 3, 4), (2, 4, 5), (2, 3)):
        with pytest.raises(RunError, match="`x`"):
            fit(rows, shape, "x")


def test_stubs_spare_the_work():
    """What a replay computes is what lies above the line, give or take 2%."""
    from engine.frost.tracing import Flops

    model, batch = staged("Llama lm", "last")
    line = line_of(model, batch)
    rows, spent = line.capture(batch), []
    for cached in (False, True):
        with Flops() as flops, torch.no_grad():
            replayed(line)(rows, **batch) if cached else model(**batch)
        spent.append(flops.total)
    assert spent[1] == pytest.approx(spent[0] * (1 - line.saved), rel=0.02)


def test_language_batches_share_no_memory_with_the_trace():
    model, batch = staged("GPT2 lm", "last")
    copies = {key: value.clone() for key, value in batch.items()}
    find(model, batch)
    assert all(torch.equal(batch[key], copies[key]) for key in copies)
    assert language().keys() == batch.keys()
