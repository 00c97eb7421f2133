"""What a plan costs: `frostline plan` for models of real size, from nothing but their config.json.

    python scripts/bench_plan.py [--json]

Each plan is a process of its own, offline, in a folder that holds a config and a recipe: no weights, no tokenizer, no
data. Times are from start to exit, imports included: on the clock, and of the processor, which is what a machine that
does nothing else would take. Memory is the process's largest resident size. It ends with 1 where a plan takes more than
15 seconds of the processor or 1.5 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MOST_SECONDS, MOST_BYTES = 15.0, 1.5 * 2**30

BERT_LARGE = {
    "model_type": "bert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 30522,
}
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
VIT_BASE = {"model_type": "vit"}
"""The defaults of its config class are ViT-B/16 at 224 pixels."""

HEAD_THEN_TOP = [
    {"name": "head", "epochs": 1},
    {"name": "top", "unfreeze": "@blocks[-4:]", "epochs": 1},
]
LORA = {"type": "lora", "target_modules": ["q_proj", "v_proj"], "r": 16}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "bert-large": (BERT_LARGE, {"task": "text-classification", "stages": HEAD_THEN_TOP}, 335.1e6),
    "llama-7b": (LLAMA_7B, {"task": "text-generation", "stages": HEAD_THEN_TOP[1:]}, 6738.4e6),
    "llama-7b, LoRA": (
        LLAMA_7B,
        {
            "task": "text-generation",
            "freeze": ["model", "lm_head"],
            "adapters": [LORA],
            "stages": [{"name": "all", "unfreeze": "@blocks", "epochs": 1}],
        },
        6738.4e6,
    ),
    "vit-base": (VIT_BASE, {"task": "image-classification", "stages": HEAD_THEN_TOP}, 85.8e6),
}
"""Name -> config, recipe, and the number of parameters that is known of the model."""


@dataclass(frozen=True)
class Measured:
    """One plan."""

    name: str
    seconds: float
    """On the clock."""
    processor_seconds: float
    peak_bytes: int
    plan: dict[str, Any]

    @property
    def within(self) -> bool:
        """Whether it kept to the limits."""
        return self.processor_seconds <= MOST_SECONDS and self.peak_bytes <= MOST_BYTES


def measure(name: str) -> Measured:
    """Plan one case in a process of its own; raises `RuntimeError` where that fails."""
    config, recipe, _ = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "model").mkdir()
        (root / "model/config.json").write_text(json.dumps(config))
        whole = {"model": "model", "data": "none/at-all", "freeze": ["@embeddings", "@blocks"], **recipe}
        (root / "recipe.yaml").write_text(json.dumps(whole))  # JSON is YAML
        words = ["plan", str(root / "recipe.yaml"), "--json", "--examples", "10000", "--data-root", folder]
        began = time.perf_counter()
        with (root / "plan.json").open("w") as out, (root / "errors").open("w+") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "engine.cli", *words],
                cwd=Path(__file__).resolve().parent.parent,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")},
                stdout=out,
                stderr=errors,
            )
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - began
            child.returncode = os.waitstatus_to_exitcode(status)
            errors.seek(0)
            if child.returncode:
                raise RuntimeError(f"{name}: exit {child.returncode}: {errors.read()[-2000:]}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Measured(
            name, seconds, usage.ru_utime + usage.ru_stime, peak, json.loads((root / "plan.json").read_text())
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    as_json = parser.parse_args().json
    measured = [measure(name) for name in CASES]
    if as_json:
        print(json.dumps([{**asdict(each), "plan": None} for each in measured], indent=1))
    else:
        print(f"{'model':<16}{'parameters':>12}{'clock':>9}{'processor':>11}{'peak':>11}")
        for each in measured:
            size = f"{each.plan['size'] / 1e6:,.1f} M"
            times = f"{each.seconds:>7.1f} s{each.processor_seconds:>9.1f} s"
            print(f"{each.name:<16}{size:>12}{times}{each.peak_bytes / 2**20:>7,.0f} MiB")
    raise SystemExit(not all(each.within for each in measured))


if __name__ == "__main__":
    main()
