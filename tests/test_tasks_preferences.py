"""Learning from preferences: DPO's loss by its own formula, the model as it was, and runs that learn to prefer."""

from __future__ import annotations

import copy
from math import log
from pathlib import Path
from typing import Any

import pytest
import running
import templates
import tiny
import torch
from running import stage
from torch.nn.functional import logsigmoid

from engine.errors import PlanError, RecipeError
from engine.records import Evaluated, StageStarted
from engine.tasks import Facts
from engine.tasks.text_generation import TextGeneration
from engine.tasks.texts import IGNORED

DPO = {"type": "text-generation", "objective": "dpo", "beta": 0.5}


def task(**keys: Any) -> TextGeneration:
    return TextGeneration.model_validate({**DPO, **keys})


def rows(count: int) -> list[dict[str, str]]:
    """What is good of a film is chosen, what is bad is rejected; prompts differ in length."""
    prompts = ["the film is" + " very" * (at % 4) for at in range(count)]
    return [{"prompt": prompt, "chosen": " good", "rejected": " bad, no fun"} for prompt in prompts]


def examples(given: list[dict[str, str]], tokenizer: Any) -> list[dict[str, Any]]:
    columns = task().encode({name: [row[name] for row in given] for name in given[0]}, tokenizer, Facts(members=2))
    columns.pop("truncated")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def worth(model: Any, example: dict[str, Any]) -> torch.Tensor:
    """The log-probability of an answer's tokens, one by one."""
    logs = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
    live = [(at, label) for at, label in enumerate(example["labels"]) if label != IGNORED]
    return torch.stack([logs[at - 1, label] for at, label in live]).sum()


def test_the_loss_is_the_papers() -> None:
    before, tokenizer = tiny.llama(initializer_range=0.2).eval(), tiny.byte_level()
    after = copy.deepcopy(before)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        pairs = examples(rows(4), tokenizer)
        referred = [{**example, "reference": float(worth(before, example))} for example in pairs]
        batch = task().collate(tokenizer)(referred)
        outputs = task().forward(after, batch)
        gains = [worth(after, example) - worth(before, example) for example in pairs]
        margins = torch.stack([0.5 * (gains[at] - gains[at + 1]) for at in range(0, 8, 2)])
        torch.testing.assert_close(outputs["margins"], margins, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs["loss"], -logsigmoid(margins).mean(), atol=1e-5, rtol=1e-4)
        assert task().reference(before(**task().inputs(batch)), batch) == pytest.approx(
            [example["reference"] for example in referred], rel=1e-4
        )
    assert task().weight(batch) == 4
    assert not {"labels", "reference"} & task().inputs(batch).keys()


def test_only_the_answers_count() -> None:
    tokenizer = tiny.byte_level()
    live = [[token for token in example["labels"] if token != IGNORED] for example in examples(rows(2), tokenizer)]
    assert [tokenizer.decode(ids) for ids in live] == [" good</s>", " bad, no fun</s>"] * 2


def place(root: Path, given: Any, judged: Any, template: str | None = None) -> Path:
    running.place(root, tiny.llama(initializer_range=0.2), given, judged)
    tiny.byte_level(template).save_pretrained(root / "model")
    return root


LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def test_a_run_learns_to_prefer_with_and_without_a_cache(tmp_path: Path) -> None:
    """The first stage begins at log 2, where the model prefers nothing; the second still weighs against the start."""
    stages = [stage("lora", unfreeze="@blocks[-2:]", epochs=3, then="merge")]
    stages += [stage("last", freeze="@blocks", unfreeze="@blocks[-1]", epochs=2, learning_rate=1e-3)]
    results = []
    for cache in ("off", "auto"):
        keys = {"freeze": ".*", "adapters": [LORA], "stages": stages, "cache": cache, "per_device_batch_size": 3}
        happened = running.run(place(tmp_path / cache, rows(32), rows(8)), task=DPO, **keys)
        said = [event.frozen for event in running.events(happened, StageStarted)]
        assert all(("replays" in text) is (cache == "auto") for text in said), said
        results.append([event.metrics for event in running.events(happened, Evaluated)])
    judged = results[0]
    assert judged[-1]["accuracy"] == 1.0
    assert log(2) > judged[0]["loss"] > judged[-1]["loss"]
    assert judged[3]["margin"] > 0.5 * judged[2]["margin"], "a stage that weighed against itself would begin at 0"
    for mine, other in zip(*results, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_before_the_first_step_nothing_is_preferred(tmp_path: Path) -> None:
    still = [stage(steps=1, learning_rate=1e-12, freeze="@blocks[-1]")]
    happened = running.run(place(tmp_path, rows(16), rows(5)), task=DPO, stages=still)
    (judged,) = running.events(happened, Evaluated)
    assert judged.metrics["loss"] == pytest.approx(log(2), rel=1e-5)
    assert judged.metrics["margin"] == pytest.approx(0.0, abs=1e-4)


def test_an_interrupted_run_goes_on_against_the_same_start(tmp_path: Path) -> None:
    """What is trained later is weighed against the model before the first stage, also after a restart."""
    from engine import load, start

    root = place(tmp_path, rows(16), rows(4))
    keys = {"task": DPO, "stages": [stage("all", steps=6)], "evaluation": {"eval_steps": 3}}
    whole = [event.metrics for event in running.events(running.run(root, **keys), Evaluated)]
    again = load.load(running.recipe(root, **keys))
    started = start.run(again, "cut", root, root / "runs", fresh=True)
    for event in started:
        if isinstance(event, Evaluated):
            next(started)  # the checkpoint of this evaluation is written before the next event
            break
    started.close()
    rest = [e.metrics for e in start.run(again, "cut", root, root / "runs") if isinstance(e, Evaluated)]
    assert rest == whole[-len(rest) :]
    assert rest


@pytest.mark.parametrize("prompted", [False, True])
def test_chats_are_preferred_by_their_ends(tmp_path: Path, prompted: bool) -> None:
    def chat(text: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    pairs = [{side: chat(row["prompt"], row[side].strip()) for side in ("chosen", "rejected")} for row in rows(20)]
    pairs = [{**pair, "prompt": "the film"} for pair in pairs] if prompted else pairs
    root = place(tmp_path, pairs[:16], pairs[16:], templates.unmarked(templates.ZEPHYR))
    happened = running.run(root, task=DPO, stages=[stage(steps=8)])
    assert running.events(happened, Evaluated)[-1].metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "no columns look like `chosen` and `rejected`"),
        ({"chosen": "a", "rejected": "b"}, "there is no `prompt` that they answer"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "row 1: `chosen` is empty"),
        ({"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "row 1: the assistant says nothing"),
    ],
)
def test_rows_are_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    place(tmp_path, [row] * 4, [row])
    with pytest.raises(PlanError) as caught:
        running.draft(tmp_path, task=DPO)
    assert said in str(caught.value)


def test_pairs_are_not_packed_and_not_smoothed(tmp_path: Path) -> None:
    root = place(tmp_path, rows(8), rows(4))
    with pytest.raises(RecipeError, match="`packing` is for `objective: likelihood`"):
        running.draft(root, task={**DPO, "packing": True})
    with pytest.raises(PlanError, match="has no classes to smooth"):
        running.run(root, task=DPO, training={"label_smoothing_factor": 0.1})
