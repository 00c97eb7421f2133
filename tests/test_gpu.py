"""What needs an accelerator: a staged run on it, in float32 and under bfloat16, cached, uncached and resumed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

RECIPE = """
model: model
task: text-classification
data: rows.jsonl
freeze: ["@embeddings", "@blocks"]
adapters: [{type: lora, target_modules: query, r: 2}]
stages:
  - {name: head, epochs: 3, learning_rate: 1e-3}
  - {name: lora, unfreeze: "@blocks[-1]", epochs: 2, then: merge}
  - {name: top, freeze: "@blocks", unfreeze: "@blocks[-1]", epochs: 2}
batch_size: 8
per_device_batch_size: 4
"""


def trained(folder, *words, **environment):
    """The weights that a run in a process of its own ends with."""
    code = "import sys; from engine.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "run", "recipe.yaml", *words]
    environment = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from safetensors.torch import load_file

    name = words[words.index("--name") + 1]
    return load_file(folder / "runs" / name / "model" / "model.safetensors"), done.stdout


@pytest.fixture
def folder(tmp_path):
    rows = tiny.reviews(64)
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    tiny.save(tiny.bert(), tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def apart(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_staged_run_is_the_same_cached_and_uncached(folder, precision):
    cached, said = trained(folder, "--name", "cached", ACCELERATE_MIXED_PRECISION=precision)
    assert "replays" in said
    plain, _ = trained(folder, "--name", "plain", "cache=off", ACCELERATE_MIXED_PRECISION=precision)
    assert apart(cached, plain) < (1e-4 if precision == "no" else 1e-2)
    assert all(tensor.dtype == torch.float32 for tensor in cached.values())
