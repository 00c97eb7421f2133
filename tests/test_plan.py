"""What a plan says of real architectures: who trains, at which rate, and which patterns are refused."""

import json
import re

import pytest
import torch
import transformers

from engine.errors import PlanError
from engine.models import draft
from engine.recipe import Recipe

FROZEN = ("@embeddings", "@blocks")


def skeleton(config, auto):
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def bert(layers=4):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    return skeleton(transformers.BertConfig(num_hidden_layers=layers, **sizes), "AutoModelForSequenceClassification")


def recipe(**keys):
    return Recipe.model_validate({"model": "m", "task": "text-classification", "data": "d"} | keys)


def stage(name="s", **keys):
    return {"name": name, "epochs": 1} | keys


def plan_of(model, examples=100, **keys):
    return draft(recipe(**keys), model, examples)[0]


def problems_of(model, **keys):
    with pytest.raises(PlanError) as caught:
        plan_of(model, **keys)
    return {problem.key: problem.sentence for problem in caught.value.problems}


def test_head_then_top_blocks():
    stages = (stage("head", learning_rate=1e-3), stage("top", unfreeze="@blocks[-2:]", epochs=2))
    head, top = plan_of(bert(), freeze=FROZEN, stages=stages).stages
    assert {name.split(".")[0:2][-1] for name in head.trainable} == {"weight", "bias", "pooler"}
    assert {name for name in top.trainable if "layer.1." in name} == set()
    assert set(head.trainable) < set(top.trainable)
    assert any(name.startswith("bert.encoder.layer.2.") for name in top.trainable)
    assert head.line == "bert.pooler.dense"
    assert top.line == "bert.encoder.layer.2"
    assert head.below > 0.9 > top.below > 0.4
    assert head.cached_cost < top.cached_cost < top.cost < 1


def test_steps_and_warmup_are_arithmetic():
    (only,) = plan_of(bert(), examples=100, batch_size=32, stages=(stage(epochs=2.5, warmup_steps=0.1),)).stages
    assert (only.steps_per_epoch, only.steps, only.warmup_steps) == (4, 10, 1)


def test_everything_trains_by_default_and_costs_one():
    (only,) = plan_of(bert(), stages=(stage(),)).stages
    assert only.size == sum(parameter.numel() for parameter in bert().parameters())
    assert only.cost == pytest.approx(1, abs=0.02)
    assert only.optimizer_bytes == 8 * only.size


def test_rates_by_pattern_and_layer_decay():
    stages = (stage(learning_rate={"bert": 1e-4, "classifier": 1e-3}, layer_decay=0.5),)
    (only,) = plan_of(bert(2), stages=stages, training={"weight_decay": 0.1}).stages
    rates = {name: group.learning_rate for group in only.groups for name in group.parameters}
    assert rates["classifier.weight"] == 1e-3
    assert rates["bert.pooler.dense.weight"] == 1e-4
    assert rates["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(0.5e-4)
    assert rates["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.25e-4)
    assert rates["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.125e-4)
    spared = {name for group in only.groups if not group.weight_decay for name in group.parameters}
    assert all(name.endswith("bias") or "LayerNorm" in name for name in spared)
    assert sum(name.endswith("bias") for name in spared) == sum(n.endswith("bias") for n in only.trainable)


def test_adapters_live_on_what_is_unfrozen_and_weights_train_where_there_are_none():
    lora = {"type": "lora", "target_modules": "query|value", "r": 2}
    stages = (
        stage("head"),
        stage("top", unfreeze="@blocks[-2:]", then="merge"),
        stage("last", freeze="bert", unfreeze="@blocks[-1]"),
    )
    head, top, last = plan_of(bert(), freeze="bert", adapters=(lora,), stages=stages).stages
    assert (head.adapters, last.adapters) == (0, 0)
    assert {attachment.name for attachment in top.attaches} == {"lora"}
    assert {target.split(".")[3] for target in top.attaches[0].targets} == {"2", "3"}
    trained = {re.sub(r".*\.(query|value)\.lora_", r"\1.lora_", name) for name in top.trainable if "lora" in name}
    assert trained == {f"{part}.lora_{side}.lora.weight" for part in ("query", "value") for side in "AB"}
    assert not any("encoder" in name and "lora" not in name for name in top.trainable)
    assert all("lora" not in name for name in last.trainable)
    assert any(name.startswith("bert.encoder.layer.3.") for name in last.trainable)


def test_norms_named_beside_adapted_blocks_train_as_weights():
    lora = {"type": "lora", "target_modules": "query", "r": 2}
    stages = (stage(unfreeze=("@blocks", "@norms")),)
    (only,) = plan_of(bert(2), freeze="bert", adapters=(lora,), stages=stages).stages
    own = {name for name in only.trainable if "lora" not in name and name.startswith("bert")}
    assert own
    assert all("LayerNorm" in name for name in own)


def test_biases_are_parameters_of_their_own():
    (only,) = plan_of(bert(2), freeze="bert", stages=(stage(unfreeze="@biases"),)).stages
    assert {name.rpartition(".")[2] for name in only.trainable if name.startswith("bert")} == {"bias"}


def test_patterns_that_do_nothing_are_refused_at_their_place():
    found = problems_of(
        bert(),
        freeze=("bert.encoder.layer.9", "bert", "bert.encoder"),
        adapters=({"type": "lora", "target_modules": ("query", "bert.embeddings.word_embeddings")},),
        stages=(stage(unfreeze=("classifier", "@blocks[-1:]", "@blocks[-2:]")),),
    )
    assert "names no module" in found["freeze", 0]
    assert "near: " in found["freeze", 0]
    assert "frozen already" in found["freeze", 2]
    assert "no stage unfreezes" in found["adapters", 0, "target_modules", 1]
    assert "`@blocks[-1:]` does nothing" in found["stages", 0, "unfreeze", 1]


def test_unfreezing_what_is_open_is_refused():
    found = problems_of(bert(), freeze="bert", stages=(stage(unfreeze="classifier"),))
    assert "it is all open already" in found["stages", 0, "unfreeze", 0]


def test_a_freeze_that_its_first_stage_undoes_is_refused():
    found = problems_of(bert(), freeze="bert", stages=(stage(unfreeze="bert"),))
    assert "the last word on all of it is `bert`" in found["freeze", 0]


def test_rates_of_nothing_are_refused():
    found = problems_of(bert(), freeze="bert", stages=(stage(learning_rate={"pooler": 1e-4, "classifier": 1e-3}),))
    assert "nothing that trains" in found["stages", 0, "learning_rate", "pooler"]


def test_a_rate_overridden_everywhere_is_refused():
    found = problems_of(bert(), stages=(stage(learning_rate={"bert.pooler": 1e-4, "bert": 1e-3}),))
    assert "narrower pattern last" in found["stages", 0, "learning_rate", "bert.pooler"]


def test_nothing_trainable_is_refused():
    found = problems_of(bert(), freeze=("bert", "classifier"), stages=(stage("still"),))
    assert found["stages", 0] == "stage `still` trains nothing; unfreeze something in it"


def test_one_tensor_asked_for_in_two_ways_is_refused():
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50}
    model = skeleton(transformers.GPT2Config(**sizes), "AutoModelForCausalLM")
    found = problems_of(model, freeze="transformer", stages=(stage(),))
    assert "one tensor (tied weights)" in found["freeze", 0]


def test_a_random_head_that_no_stage_trains_is_refused():
    stages = (stage(unfreeze="@blocks[-1]"),)
    with pytest.raises(PlanError, match="starts at random"):
        draft(recipe(freeze=("bert", "classifier"), stages=stages), bert(), 10, ("classifier.weight",))


def test_a_field_that_peft_does_not_have_is_refused():
    lora = {"type": "lora", "target_modules": "query", "rank": 4}
    found = problems_of(bert(), freeze="bert", adapters=(lora,), stages=(stage(unfreeze="@blocks"),))
    assert "`rank` is no field of PEFT's LoraConfig" in found["adapters", 0]


@pytest.mark.parametrize(("kind", "stages"), [("gradual", 6), ("lp_ft", 2), ("chain_thaw", 7)])
def test_schedules_generate_stages_that_each_do_something(kind, stages):
    generated = plan_of(bert(), freeze=FROZEN, stages={"type": kind, "epochs": 1}).stages
    assert len(generated) == stages
    assert generated[-1].size == sum(parameter.numel() for parameter in bert().parameters())
    assert len({stage.trainable for stage in generated}) == stages


def test_the_plan_is_a_pure_function_with_a_fingerprint():
    keys = {"freeze": FROZEN, "stages": {"type": "gradual", "epochs": 1}}
    one, other = plan_of(bert(), **keys), plan_of(bert(), **keys)
    assert one == other
    assert one.fingerprint == other.fingerprint
    assert json.loads(json.dumps(one.json())) == one.json()
    assert plan_of(bert(), seed=1, **keys).fingerprint != one.fingerprint
    assert plan_of(bert(), examples=500, **keys).fingerprint != one.fingerprint
