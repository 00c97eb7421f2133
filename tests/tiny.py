"""Tiny models, a tiny tokenizer and small files for tests: from configs and a fixed seed, nothing is downloaded."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import nn

WORDS = ["the", "a", "film", "is", "good", "bad", "very", "not", "dull", "great", "plot", "and", "cast", "no", "fun"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = len(SPECIAL) + len(WORDS)
POSITIONS = 32
BLOCKS = 4
IMAGE = 32
"""Height and width of the images that the vision models take, in pixels."""


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer in BERT's layout: `[CLS] text [SEP] pair [SEP]`, 32 tokens at most."""
    model = Tokenizer(WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    ends = [(word, SPECIAL.index(word)) for word in ("[CLS]", "[SEP]")]
    model.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=POSITIONS,
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def byte_level(
    template: str | None = None, ends: Sequence[str] = ("<s>", "</s>")
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with merges, as language models have it; the last of `ends` ends a text, any may in a chat."""
    model = Tokenizer(BPE())
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", *ends], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([" ".join(WORDS), "the film is good, the plot is dull."] * 4, trainer)
    names = {"pad_token": "<pad>", "bos_token": ends[0], "eos_token": ends[-1]}
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        model_max_length=64,
        model_input_names=inputs,
        additional_special_tokens=list(ends),
        chat_template=template,
        **names,
    )


def bert(num_labels: int = 2, seed: int = 0, kind: str = "BertForSequenceClassification", **config: Any) -> nn.Module:
    """A BERT of 4 blocks of 16 with a classification head, or with what the class `kind` has on top."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "num_labels": num_labels}
    return _seeded(seed, getattr(transformers, kind), transformers.BertConfig(**(sizes | config)))


def gpt2(seed: int = 0, **config: Any) -> nn.Module:
    """A GPT-2 of 4 blocks of 16 that predicts the next token; its output embeddings are its input embeddings."""
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": BLOCKS, "n_positions": POSITIONS, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return _seeded(seed, transformers.GPT2LMHeadModel, transformers.GPT2Config(**(sizes | ends | config)))


def llama(seed: int = 0, **config: Any) -> nn.Module:
    """A Llama of 4 blocks of 16 for the vocabulary of `byte_level`."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
    sizes |= {"vocab_size": 320, "max_position_embeddings": 64, "num_key_value_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return _seeded(seed, transformers.LlamaForCausalLM, transformers.LlamaConfig(**(sizes | ends | config)))


def t5(seed: int = 0, **config: Any) -> nn.Module:
    """A T5 of 2 blocks of 16 on either side, for the vocabulary of `byte_level`."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2, "vocab_size": 320}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return _seeded(seed, transformers.T5ForConditionalGeneration, transformers.T5Config(**(sizes | ends | config)))


def vit(num_labels: int = 2, seed: int = 0, **config: Any) -> nn.Module:
    """A ViT of 4 blocks of 16 over patches of 8 pixels."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": BLOCKS}
    sizes |= {"image_size": IMAGE, "patch_size": 8, "num_labels": num_labels}
    return _seeded(seed, transformers.ViTForImageClassification, transformers.ViTConfig(**(sizes | config)))


def resnet(num_labels: int = 2, seed: int = 0, **config: Any) -> nn.Module:
    """A ResNet of 4 stages of one layer: what has BatchNorm in it."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = sizes | {"num_labels": num_labels} | config
    return _seeded(seed, transformers.ResNetForImageClassification, transformers.ResNetConfig(**config))


def save(model: nn.Module, folder: Path, prepares: Any = None) -> Path:
    """The model and a tokenizer, `tokenizer()` if left out, as a folder that `from_pretrained` reads."""
    model.save_pretrained(folder)
    (prepares or tokenizer()).save_pretrained(folder)
    return folder


def reviews(count: int) -> list[dict[str, Any]]:
    """Distinct texts with a label that follows from them: good or bad."""
    rows = []
    for index in range(count):
        words = [WORDS[(index >> shift) % len(WORDS)] for shift in (0, 2, 4, 6, 8)]
        mood = ("good", "bad")[index % 2]
        rows.append({"text": " ".join(["the film", "is", *words, mood] + ["very"] * (index // 64)), "label": mood})
    return rows


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """One JSON object a line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], delimiter: str = ",") -> Path:
    """A header and the rows; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def _seeded(seed: int, kind: Any, config: Any) -> nn.Module:
    """The model with weights that follow from the seed, without touching the test's own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)
