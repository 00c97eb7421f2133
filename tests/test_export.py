"""What a run is exported to: it answers as the model does, elsewhere; its card tells, and hostile words stay words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import running
import tiny
import torch
import transformers
from huggingface_hub import ModelCard

from engine import export, report
from engine.cli import main
from engine.errors import RunError
from engine.load import load
from engine.shipping import card, graphs, upload

HOSTILE = [
    "a|b",
    "[x](javascript:alert(1))",
    "<script>",
    "**",
    "`",
    "```",
    "---",
    "a\n---\nlicense: mit",
    "{{ 7 }}",
    "www.x.y",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a BERT of one block."""
    root = running.place(tmp_path_factory.mktemp("export"), tiny.bert(num_hidden_layers=1))
    running.run(root)
    return root


def python_of(folder: Path) -> str:
    """The lines of Python that a card shows."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


def says(folder: Path) -> str:
    """What they print, run in their folder by a process that knows nothing of us."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "-I", "-W", "ignore", "-c", python_of(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_onnx_answers_as_the_model_does_and_int8_is_judged(root: Path) -> None:
    folder, said = export.export(root / "runs/recipe", "onnx", int8=True, root=root)
    facts = json.loads((folder / "export.json").read_text())
    assert [one["shapes"]["input_ids"][0] for one in facts["compared"]] == [1, 3]
    assert all(one["difference"] <= 1e-6 for one in facts["compared"])
    scores = facts["int8"]["scores"]
    assert set(scores) == {"model.onnx", "model.int8.onnx"}
    run = report.read(root / "runs/recipe").of("evaluated")[-1]["metrics"]
    assert scores["model.onnx"]["accuracy"] == run["accuracy"], "the file is judged as the model was"
    assert "largest difference" in said[0]
    assert "accuracy" in said[1]
    assert "InferenceSession" in python_of(folder)
    rows = (root / "rows/train.jsonl").read_text()
    assert not [
        text for text in re.findall(r'"text": "(.*?)"', rows) if text.encode() in (folder / "model.onnx").read_bytes()
    ]


def test_what_differs_is_refused_and_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(_task: Any, model: Any, _inputs: Any, _kind: str, path: Path) -> None:
        path.write_bytes(b"no graph at all")

    monkeypatch.setattr(graphs, "save", other)
    with pytest.raises(RunError, match="can't be used in a process of its own") as caught:
        export.export(root / "runs/recipe", "onnx", root / "broken", root=root)
    assert caught.value.exit_code == 5
    monkeypatch.setattr(graphs, "_ask", lambda file, folder: None)
    monkeypatch.setattr(graphs, "load_file", lambda path: {"logits": torch.full((1, 2), 9.0)})
    with pytest.raises(RunError, match="differs from the model by inf"):
        export.export(root / "runs/recipe", "onnx", root / "broken", root=root)
    assert not (root / "broken").exists()
    assert not list(root.glob(".staging*"))


@pytest.mark.parametrize(
    ("own", "other", "found"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([1.0, float("-inf")], [1.0, float("-inf")], 0.0),
        ([1.0, float("-inf")], [1.0, 3.0], float("inf")),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_a_difference_is_the_largest_of_any_number(own: list[float], other: list[float], found: float) -> None:
    assert graphs._difference({"a": torch.tensor(own)}, {"a": torch.tensor(other)}) == found
    assert graphs._difference({"a": torch.tensor(own)}, {"b": torch.tensor(own)}) == float("inf")


def test_weights_go_with_a_card_whose_code_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = root / "runs/recipe"
    assert told(capsys, str(run), "--to", "safetensors")[0] == 0
    made = run / "export/safetensors"
    assert (made / "model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()
    found = ModelCard.load(made / "README.md")
    assert (found.data.pipeline_tag, found.data.library_name) == ("text-classification", "transformers")
    assert found.data.base_model is None, "a folder is no model of the Hub"
    assert {result.metric_type for result in found.data.eval_results} == {"loss", "accuracy", "f1"}
    assert "bad, good" in found.text
    assert (made / "schedule.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "torch", "onnx"])
def test_the_code_of_a_card_says_what_the_model_says(root: Path, tmp_path: Path, to: str) -> None:
    folder, _ = export.export(root / "runs/recipe", to, tmp_path / to, root=root)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(root / "runs/recipe/model").eval()
    inputs = tiny.tokenizer()(["A sentence.", "Another one, somewhat longer."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.argmax(-1).tolist()
    assert [int(number) for number in re.findall(r"\d", says(folder))] == expected


def test_refusals_are_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, full = str(root / "runs/recipe"), root / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    for words, code, said in (
        ((run, "--to", "gguf"), 2, "no export to `gguf`"),
        ((run, "--to", "torch", "--int8"), 2, "`--to onnx --int8`"),
        ((run, "--to", "adapter"), 2, "kept no adapters apart"),
        ((str(root / "rows"), "--to", "onnx"), 3, "holds no finished run"),
        ((run, "--to", "safetensors", "--out", str(full)), 2, "exists and is no export"),
        ((run, "--to", "safetensors", "--push-to-hub", "nobody"), 2, "write `owner/name`"),
    ):
        ended, out, err = told(capsys, *words)
        assert (ended, out, err.count("\n")) == (code, "", 1), err
        assert said in err
    assert (full / "mine.txt").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_onnx", None)
    ended, _, err = told(capsys, run, "--to", "onnx", "--data-root", str(root), "--out", str(root / "none"))
    assert (ended, err.count("\n")) == (3, 1)
    assert "pip install frostline[export]" in err
    assert not (root / "none").exists()


def test_the_hub_gets_a_list_first_and_no_network_is_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    run = str(root / "runs/recipe")
    words = (run, "--to", "safetensors", "--push-to-hub", "some/model")
    code, out, _ = told(capsys, *words, "--dry-run")
    assert code == 0
    assert {"README.md", "model.safetensors", "schedule.png"} <= set(out.split())
    assert "files" in out.splitlines()[-1]
    code, out, err = told(capsys, *words)  # HF_HUB_OFFLINE is set for all tests
    assert code == 3
    assert err.startswith("the Hub can't be reached")
    assert err.count("\n") == 1
    written = b"".join(path.read_bytes() for path in (root / "runs/recipe/export").rglob("*") if path.is_file())
    assert "hf_secret" not in out + err
    assert b"hf_secret" not in written


def test_the_client_is_the_hubs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Client:
        def create_repo(self, name: str, **how: Any) -> str:
            calls.append((name, how))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **how: Any) -> None:
            calls.append(("upload", how["folder_path"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    assert upload.push(tmp_path, "a/b") == "https://huggingface.co/a/b"
    assert calls == [("a/b", {"private": True, "exist_ok": True}), ("upload", tmp_path)]
    monkeypatch.setattr(Client, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("hf_abcdef is bad")))
    with pytest.raises(RunError, match=r"hf_\.\.\. is bad"):
        upload.push(tmp_path, "a/b")


@pytest.mark.parametrize("word", HOSTILE)
def test_hostile_words_break_neither_header_nor_markdown(root: Path, tmp_path: Path, word: str) -> None:
    from markdown_it import MarkdownIt

    papers = report.read(root / "runs/recipe")
    recipe = load(root / "runs/recipe/recipe.yaml").recipe
    data = recipe.data.model_copy(update={"path": word})
    model = recipe.model.model_copy(update={"path": word, "revision": word})
    hostile = recipe.model_copy(update={"data": data, "model": model})
    written = {**papers.__dict__, "recipe": f"a: {word}\n```\n# out\n"}
    card.write(tmp_path, report.Papers(**written), hostile, [word, "plain"], f"x = {word!r}")
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.license is None
    assert found.data.eval_results[0].dataset_name == " ".join(word.split("\n"))
    tokens = MarkdownIt("commonmark").enable("table").parse(found.text)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == ["recipe", "Results", "How to use it", "Data", "Training"]
    inline = [part.type for token in tokens for part in token.children or ()]
    assert not {"link_open", "html_inline", "em_open", "strong_open"} & set(inline)
    assert [token.type for token in tokens].count("fence") == 2
    assert "html_block" not in [token.type for token in tokens]
