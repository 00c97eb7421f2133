"""What a plan costs: `frostline plan` of large models from their config alone, time and memory of the process.

    python scripts/bench_plan.py

No weights exist here, so none can be read; the numbers are those of a fresh process, imports included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import transformers

MODELS = {
    "bert-large": (
        transformers.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        "text-classification",
    ),
    "llama-7b": (transformers.LlamaConfig(pad_token_id=0, architectures=["LlamaForCausalLM"]), "text-generation"),
    "vit-base": (transformers.ViTConfig(), "image-classification"),
}
RECIPE = """
model: {name}
task: {task}
data: none
freeze: ["@embeddings", "@blocks"]
stages: [{{name: top, unfreeze: "@blocks[-4:]", epochs: 1}}]
"""


def planned(folder: Path, name: str) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and peak MiB of planning one model."""
    config, task = MODELS[name]
    config.save_pretrained(folder / name)
    (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, task=task))
    code = "import sys; from engine.cli import main; main(sys.argv[1:])"
    words = ["plan", str(folder / f"{name}.yaml"), "--examples", "1000", "--data-root", str(folder)]
    began = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", code, *words])
    _, status, used = os.wait4(child, 0)
    if status:
        raise subprocess.CalledProcessError(status, words)
    return used.ru_utime + used.ru_stime, time.perf_counter() - began, used.ru_maxrss / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = {name: planned(Path(folder), name) for name in MODELS}
    print(f"{'model':12}{'CPU s':>8}{'wall s':>8}{'peak MiB':>10}")
    for name, (cpu, wall, peak) in figures.items():
        print(f"{name:12}{cpu:8.1f}{wall:8.1f}{peak:10,.0f}")


if __name__ == "__main__":
    main()
