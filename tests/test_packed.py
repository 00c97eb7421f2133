"""GGUF files, written here by llama.cpp's own package: read, fine-tuned with adapters, saved as ordinary weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from running import events, place, refused, run, stage
from test_apart import put_together
from torch import nn

from engine.modelling import packed
from engine.recipe import Model
from engine.records import Evaluated, Note, Proved

TASK = {"type": "text-generation", "max_length": 32}
LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def llama() -> nn.Module:
    """Wide enough for GGUF's blocks of 32."""
    return tiny.llama(hidden_size=64, intermediate_size=64, initializer_range=0.2)


def pack(model: Any, file: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Write a Llama as llama.cpp's converter does: its names, its order of rotated halves, and its own numbers."""
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        values, own = tensor.numpy(), named(name)
        if "attn_q" in own or "attn_k" in own:
            heads = config.num_attention_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(own, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(name: str) -> str:
    """llama.cpp's name of a tensor."""
    owner, _, what = name.rpartition(".")
    if owner.startswith("model.layers."):
        _, _, block, inside = owner.split(".", 3)
        return f"blk.{block}.{NAMES[inside]}.{what}"
    return f"{NAMES[owner]}.{what}"


def folder(root: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """`root` with a GGUF file and a tokenizer in `model`, and no other weights or config."""
    model = llama()
    place(root, model)
    tiny.byte_level().save_pretrained(root / "model")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (root / "model" / file).unlink()
    pack(model, root / "model/tiny.gguf", kind)
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 5, 7, 9, 11, 3]])).logits


@pytest.mark.parametrize("kind", [pytest.param("F32", marks=pytest.mark.slow), "Q8_0"])
def test_a_packed_model_trains_with_adapters_and_is_saved_as_an_ordinary_one(tmp_path: Path, kind: str) -> None:
    root = folder(tmp_path, gguf.GGMLQuantizationType[kind])
    keys = {"model": {"path": "model", "gguf_file": "tiny.gguf"}, "task": TASK, "adapters": [LORA]}
    freeze, stages = ["@embeddings", "@blocks", "@head"], [stage("top", unfreeze="@blocks[-2:]", steps=6)]
    happened = run(root, **keys, freeze=freeze, stages=stages)
    assert events(happened, Evaluated)
    assert events(happened, Proved)[0].still > 0
    assert any("unpacked from tiny.gguf" in note.sentence for note in events(happened, Note))
    saved = transformers.AutoModelForCausalLM.from_pretrained(root / "runs/recipe/model")
    assert not hasattr(saved.config, "quantization_config")
    before, after = llama().state_dict(), saved.state_dict()
    close = {"atol": 1e-6 if kind == "F32" else 1e-2, "rtol": 0}
    torch.testing.assert_close(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"], **close)
    torch.testing.assert_close(
        after["model.layers.0.self_attn.k_proj.weight"], before["model.layers.0.self_attn.k_proj.weight"], **close
    )
    if kind == "F32":
        assert put_together(root, "AutoModelForCausalLM", "[[2, 5, 7, 9, 11, 3]]") <= 1e-5
    assert not torch.equal(
        after["model.layers.3.self_attn.q_proj.weight"], before["model.layers.3.self_attn.q_proj.weight"]
    )


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    root = folder(tmp_path)
    described = Model.model_validate({"path": "model", "gguf_file": "tiny.gguf"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root / "model", dtype=torch.float32, **packed.weights(described, str(root / "model"))
    )
    packed.forget(described, model)
    torch.testing.assert_close(logits(model), logits(llama()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("named", "words"),
    [("other.gguf", "has no file `other.gguf`; GGUF files there: tiny.gguf"), ("../tiny.gguf", "is no name of a GGUF")],
)
def test_files_that_are_not_there_are_refused(tmp_path: Path, named: str, words: str) -> None:
    key, said = refused(folder(tmp_path), model={"path": "model", "gguf_file": named}, task=TASK)
    assert key == ("model", "gguf_file")
    assert words in said


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path)
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    _, said = refused(root, model={"path": "model", "gguf_file": "tiny.gguf"}, task=TASK)
    assert said.endswith("run `pip install frostline[gguf]`")
