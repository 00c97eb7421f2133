"""What strangers write: recipes, models, rows, templates, folders. Refused in one sentence, or harmless.

Bombs of YAML are in test_load.py, pages in test_report.py, folders of pictures in test_media.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import running
import staged
import tiny

from engine import cli, store
from engine.errors import ENVIRONMENT, PlanError, RunError
from engine.tasks import chats, confined

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running.place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def root(place: Path, tmp_path: Path) -> Path:
    """A folder with a model and rows, and beside it a file that no recipe may reach."""
    (tmp_path / "secret.jsonl").write_text('{"text": "secret", "label": "good"}\n')
    return Path(shutil.copytree(place, tmp_path / "root"))


@pytest.fixture
def told(root: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A command on a recipe for what lies in `root`: its exit code and all that it says."""

    def tell(verb: str, *more: str, **keys: Any) -> tuple[int, str]:
        words = [verb, str(running.recipe(root, **keys)), "--data-root", str(root), *more]
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, "--runs", str(root / "runs")] if verb == "run" else words)
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return tell


def refused(said: str) -> bool:
    """Whether what was said is one line that can be printed, and no traceback."""
    return len(said.splitlines()) == 1 and said.strip().isprintable() and len(said) < 700


def payload(canary: Path) -> bytes:
    """A pickle that makes a file when it is opened."""

    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    return pickle.dumps(Payload())


def test_the_payload_is_live(tmp_path: Path):
    pickle.loads(payload(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


# Models


def rewritten(file: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | fields))

    return change


def replaced(file: str, content: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(content)


def indexed(file: str) -> Change:
    """The weights in a file that only an index names."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / file)
        names = {"bert.embeddings.word_embeddings.weight": file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return change


def header(size: int, content: bytes) -> Change:
    return replaced("model.safetensors", size.to_bytes(8, "little") + content)


LIE = b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
CODE = {"AutoModel": "own.Model", "AutoConfig": "own.Model", "AutoTokenizer": ["own.Model", "own.Model"]}
MODELS: list[tuple[Change, int, str]] = [
    (rewritten("config.json", model_type="own", auto_map=CODE), 2, "asks for code of its own (`auto_map`"),
    (rewritten("config.json", inner={"deep": [{"auto_map": CODE}]}), 2, "asks for code of its own (`auto_map`"),
    (rewritten("config.json", _attn_implementation="evil/kernels"), 2, "asks for kernels of another repository"),
    (rewritten("config.json", attn_implementation="evil/kernels:run"), 2, "asks for kernels of another repository"),
    (rewritten("adapter_config.json", base_model_name_or_path="/etc", peft_type="LORA"), 2, "is an adapter"),
    (rewritten("config.json", dtype="__import__('os')"), 2, "fits no model"),
    (rewritten("config.json", hidden_act="os.system"), 2, "fits no model"),
    (rewritten("config.json", text_config={"a": 1}), 2, "parts that its kind of model doesn't have"),
    (rewritten("config.json", hidden_size=10**9), 2, "claims 17,000,000,351,000,000,130 parameters"),
    (rewritten("config.json", vocab_size=10**18), 2, "fits no model"),
    (rewritten("config.json", hidden_size=-4), 2, "fits no model"),
    (rewritten("config.json", hidden_size="x"), 2, "fits no model"),
    (rewritten("config.json", num_hidden_layers=10**9), 2, "claims more than 1,000 layers"),
    (rewritten("config.json", type_vocab_size=10**11), 3, "GB for its weights and this machine has"),
    (replaced("config.json", b'{"a":' + b"[" * 10**6), 2, "fits no model"),
    (replaced("config.json", b"[1]"), 2, "is no mapping"),
    (replaced("tokenizer.json", b"[" * 10**6), 2, "fits no model"),
    (indexed("../outside.safetensors"), 2, "names `../outside.safetensors`, which is no safetensors file beside it"),
    (indexed("pytorch_model.bin"), 2, "names `pytorch_model.bin`, which is no safetensors file beside it"),
    (replaced("model.safetensors.index.json", b"{"), 2, "that can't be read"),
    (header(10**15, b"{}"), 3, "header too large"),
    (header(99 * 10**6, b" " * 100), 3, "invalid header length"),
    (header(10**5, b"[" * 10**5), 3, "invalid JSON in header"),
    (header(len(LIE), LIE + b"\0" * 4), 3, "overflow computing buffer size"),
]


@pytest.mark.parametrize(("change", "code", "words"), MODELS)
def test_a_model(root: Path, told: Callable[..., tuple[int, str]], change: Change, code: int, words: str):
    change(root / "model")
    began = time.process_time()
    ended, said = told("run")
    assert (ended, words in said, refused(said)) == (code, True, True), said
    assert time.process_time() - began < 10.0


def test_code_and_pickles_of_a_model_are_never_run(root: Path, told: Callable[..., tuple[int, str]]):
    """Beside weights that are right, they lie there and nothing else."""
    canary = root / "canary"
    for name in ("own.py", "modeling_own.py", "tokenization_own.py"):
        (root / "model" / name).write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "adapter_model.bin"):
        (root / "model" / name).write_bytes(payload(canary))
    rewritten("tokenizer_config.json", auto_map=CODE)(root / "model")
    rewritten("generation_config.json", custom_generate="own.py")(root / "model")
    code, said = told("run")
    assert code == 0, said
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_weights_that_are_pickles_are_not_opened(root: Path, told: Callable[..., tuple[int, str]], name: str):
    (root / "model/model.safetensors").unlink()
    (root / "model" / name).write_bytes(payload(root / "canary"))
    code, said = told("run")
    assert (code, "never opened" in said, refused(said)) == (2, True, True), said
    assert not (root / "canary").exists()


# Rows


def rows(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_bytes(content)

    return change


def spread(head: str, row: str) -> Change:
    return rows("train.csv", "\n".join([head, *(row.format(i) for i in range(30))]).encode())


ROWS: list[tuple[Change, str]] = [
    (rows("train.jsonl", b"\x1f\x8b" + b"\0" * 100), "train.jsonl is packed (gzip), and nothing is unpacked here"),
    (rows("train.csv", b"PK\x03\x04" + b"\0" * 100), "is packed (zip)"),
    (rows("train.txt", b"\x28\xb5\x2f\xfd" + b"\0" * 100), "is packed (zstd)"),
    (rows("train.csv", b"../../escape".ljust(257, b"\0") + b"ustar" + b"\0" * 300), "is packed (tar)"),
    (rows("train.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"), "train.parquet can't be read"),
    (rows("train.jsonl", b"[" * 10**5), "train.jsonl can't be read"),
    (rows("train.jsonl", b'{"text": "a", "label": ' + b"[" * 900 + b"]" * 900 + b"}"), "train.jsonl can't be read"),
    (rows("train.jsonl", b'{"text": "a", "label": "\xff\xfe"}'), "train.jsonl can't be read"),
    (rows("rows.py", b"raise SystemExit(99)"), "holds no file that can be read as data"),
    (spread("text,label", "a,film {},good"), "train.csv, row 1: it has more cells than its header has names, 3 and 2"),
    (spread("text;label", "a film;{}"), "row 1: it and the header have `;` between their cells, not `,`; save the"),
    (spread("text;label", "a film, {};good"), "row 1: it and the header have `;` between their cells, not `,`; save"),
    (rows("train.csv", b"text,label\na,x\n\nb;y\n"), "row 2: of 2 cells it has 1 by `,` as the header has them, and 2"),
    (rows("train.csv", b'text,label\n"a\nb",x\nb,y,z\n'), "row 2: it has more cells than its header has names, 3"),
    (rows("train.tsv", b"text\tlabel\na,x\nb,y\n"), "train.tsv, row 1: of 2 cells it has 1 by a tab"),
    (spread("text,label", '"a film {},good'), "train.csv"),
]


@pytest.mark.parametrize(("change", "words"), ROWS)
def test_rows(root: Path, told: Callable[..., tuple[int, str]], change: Change, words: str):
    change(root / "rows")
    code, said = told("plan")
    assert (code, words in said) == (2, True), said
    assert "Traceback" not in said


def test_a_file_that_is_none(root: Path, told: Callable[..., tuple[int, str]]):
    os.mkfifo(root / "rows/pipe.jsonl")
    (root / "rows/rows.py").write_text("raise SystemExit(99)")
    for name, words in (("pipe.jsonl", "is no ordinary file"), ("rows.py", "is no file of rows")):
        code, said = told("plan", data=f"rows/{name}")
        assert (code, words in said, refused(said)) == (2, True, True), said


PATHS = ["../secret.jsonl", "x/../../secret.jsonl", "/etc/passwd", "~/.netrc", "link", "file:///etc/passwd", "a\0b", ""]


@pytest.mark.parametrize("path", [*PATHS, "http://a/b.csv", "s3://a/b", "zip://a::b"])
def test_paths_of_rows_and_models_stay_inside(root: Path, told: Callable[..., tuple[int, str]], path: str):
    (root / "link").symlink_to(root.parent / "secret.jsonl")
    files = ({"path": "json", "data_files": path}, {"path": "text", "data_files": {"train": [path]}})
    wanted = [{"data": path}, *({"data": each} for each in files), {"model": path}]
    for keys in wanted:
        code, said = told("plan", **keys)
        assert (code, refused(said)) == (2, True), said


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", "", "~", "-rf", "a\nb", "a\0b", "x" * 101])
def test_a_run_lies_in_its_folder(root: Path, told: Callable[..., tuple[int, str]], name: str):
    code, said = told("run", f"--name={name}")
    assert (code, "can't name a run" in said or not name) == (2 if name else 0, True), said
    assert {path.name for path in root.parent.iterdir()} == {"root", "secret.jsonl"}


def test_a_line_of_ten_megabytes(root: Path, told: Callable[..., tuple[int, str]]):
    tiny.write_jsonl(root / "rows/train.jsonl", [{"text": "a" * 10**7, "label": "good"}, *tiny.reviews(30)])
    code, said = told("run")
    assert code == 0, said


def test_labels_and_columns_are_only_text(root: Path, told: Callable[..., tuple[int, str]]):
    labels = ["[/b]\x1b]0;title\x07\u202e", "[bold red]good[/]\x1b[2J"]
    hostile = [{"text": f"the film {i}", "label": labels[i % 2], "\x1b[2J[/x]\u2066": "x"} for i in range(40)]
    for split in ("train", "validation"):
        tiny.write_jsonl(root / f"rows/{split}.jsonl", hostile)
    code, said = told("run")
    assert code == 0, said
    assert all(line.strip().isprintable() for line in said.splitlines() if line.strip())
    assert "[/b]]0;title" in said


@pytest.mark.parametrize("pattern", [r"(\w+\.?)+bias_proj", r"(a|a)*b", r"(.*)*x", r"((\w+\.)+)+nothing", "a" * 600])
def test_a_pattern_that_never_ends(root: Path, told: Callable[..., tuple[int, str]], pattern: str):
    began = time.process_time()
    code, said = told("plan", freeze=pattern)
    assert (code, refused(said)) == (2, True), said
    assert time.process_time() - began < 10.0


# Chat templates

SAY = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
TEMPLATES = [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
    ("{% include '/etc/passwd' %}", "refuses|fails|no loader"),
    ("{% for i in range(10**9) %}{% endfor %}", "refuses|Range too big"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
    ("{{ 10**(10**9) }}", "takes longer than|takes more than"),
    ("{{ 'a' * 2 * 10**9 }}", "takes more than"),
    ("{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}", "takes more than|takes longer than"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
]


@pytest.mark.parametrize(("template", "words"), TEMPLATES)
def test_a_template_has_little_time_and_little_memory(template: str, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(confined, "SECONDS", 2.0)
    chat = [{"role": "user", "content": "the film?"}, {"role": "assistant", "content": "good"}]
    began = time.monotonic()
    with pytest.raises(PlanError, match=words):
        list(chats.all_tokens([chat], tiny.byte_level(SAY + template)))
    assert time.monotonic() - began < 20.0


def test_a_template_that_ends_its_process_is_told_of():
    with pytest.raises(confined.ConfinedError, match="or ends its process"):
        list(confined.confined(lambda item: os.kill(os.getpid(), signal.SIGKILL), [1]))
    assert list(confined.confined(lambda item: item * 2, [1, 2])) == [2, 4]


# Folders


def test_pickles_in_checkpoints_and_cache_are_never_opened(tmp_path: Path):
    root = staged.place(tmp_path)
    assert staged.run(root, plant=staged.signal_at(12, signal.SIGKILL)) == [-signal.SIGKILL]
    bomb = payload(root / "canary")
    checkpoints = sorted(staged.folder(root).glob("checkpoints/stage*"), key=lambda path: path.stat().st_mtime_ns)
    stores = [path.parent for path in (root / "runs/.cache").glob("*/header.json")]
    for folder in (*checkpoints, *stores, staged.folder(root)):
        for name in ("optimizer.pt", "rng_state.pth", "custom_checkpoint_0.pkl", ".metadata"):
            (folder / name).write_bytes(bomb)
        with (folder / "rows.npy").open("wb") as file:
            np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (checkpoints[-1] / "moments.safetensors").write_bytes(bomb)
    (stores[0] / "cut0.rows").write_bytes(bomb)
    assert len(checkpoints) >= 2
    assert staged.run(root) == [0], staged.said(root)
    assert f"{checkpoints[-1].name} skipped: moments.safetensors" in staged.said(root)
    assert not (root / "canary").exists()


def test_a_token_is_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    canaries = {name: f"hf_{name.lower()}_canary" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    root = staged.place(tmp_path)
    assert staged.run(root, plant=staged.signal_at(5, signal.SIGTERM)) == [143]
    outputs = staged.said(root)
    assert staged.run(root) == [0]
    (root / "rows/train.jsonl").write_text("{")
    assert staged.run(root, "--fresh") == [2]
    written = [path.read_bytes() for path in root.rglob("*") if path.is_file()]
    assert len(written) > 20
    for value in canaries.values():
        assert value not in outputs
        assert not any(value.encode() in content for content in written)


def test_a_cache_that_is_a_link_or_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (victim := tmp_path / "victim").mkdir(mode=0o755)
    (tmp_path / "cache").symlink_to(victim)
    with pytest.raises(RunError, match="is a link to elsewhere") as linked:
        store.own(tmp_path / "cache")
    assert victim.stat().st_mode & 0o777 == 0o755
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(RunError, match="belongs to another user") as foreign:
        store.own(tmp_path / "own")
    assert linked.value.exit_code == foreign.value.exit_code == ENVIRONMENT


def test_a_planted_link_is_not_followed_by_what_is_saved(tmp_path: Path):
    """Wherever a run writes, a link that lies there already costs no file elsewhere a byte."""
    root = staged.place(tmp_path)
    (victim := root / "victim").write_text("untouched")
    staged.folder(root).mkdir(parents=True)
    for name in ("recipe.yaml", "plan.json", "manifest.json", "report.html", "run.lock", "confusion.json"):
        (staged.folder(root) / name).symlink_to(victim)
    assert staged.run(root) in ([0], [3]), staged.said(root)
    assert victim.read_text() == "untouched"
