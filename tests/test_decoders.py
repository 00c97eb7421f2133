"""GPT-like models that judge a text by its last token, wherever its padding begins: replayed they learn the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
import transformers
from running import FROZEN, events, place, run, stage

from engine.records import Evaluated, StageStarted, Step

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

WIDE = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": tiny.POSITIONS}
LLAMA = {**WIDE, "intermediate_size": 32, "num_key_value_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": tiny.POSITIONS},
    "Llama": LLAMA,
    "Mistral": LLAMA,
    "Qwen2": LLAMA,
    "Gemma": {**LLAMA, "head_dim": 8},
    "OPT": {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "GPTNeoX": {**WIDE, "intermediate_size": 32},
    "Bloom": {"hidden_size": 16, "n_head": 2, "n_layer": 4},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "GPT2" else pytest.mark.slow) for k in KINDS])
def test_it_is_the_same_replayed_and_in_full(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = getattr(transformers, f"{kind}Config")(vocab_size=tiny.VOCABULARY, pad_token_id=0, **KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    rows = [{**row, "text": row["text"] + " very" * (index % 7)} for index, row in enumerate(tiny.reviews(64))]
    root = place(tmp_path, model, rows[:24], rows[48:])
    stages = [stage("head", epochs=2), stage("top", unfreeze="@blocks[-2:]", epochs=2)]
    losses = []
    for cache in ("off", "auto"):
        happened = run(root, freeze=FROZEN, stages=stages, training={"logging_steps": 3}, cache=cache)
        told = [*(event.loss for event in events(happened, Step))]
        losses.append([*told, *(event.metrics["loss"] for event in events(happened, Evaluated))])
    # A text is kept as it came out beside others than it trains with, and padded otherwise: the last bit may differ.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert all("replays" in event.frozen for event in events(happened, StageStarted))
