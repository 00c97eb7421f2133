"""Tiny models of many families, weights at random, each with a batch and with the parts that a stage may train."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
PICTURE = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
UNTIED = DECODER | {"tie_word_embeddings": False}
SOUND = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 20,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16,
    "mask_time_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One model and task."""

    name: str
    """`<config class without Config> <task>`."""
    settings: Mapping[str, Any]
    blocks: str
    """Regular expression of the blocks' module names."""
    head: str
    """Regular expression of the modules above the last block."""
    batch: Callable[[], dict[str, Tensor]]
    auto: str = "AutoModelForSequenceClassification"
    ragged: bool = False
    """Whether examples have lengths and a mask."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Stage -> a word of the reason why it has no frost line."""
    slow: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.name.split()[0] + "Config")(**self.settings)
        config._attn_implementation = "eager" if self.settings.get("eager") else None
        return getattr(transformers, self.auto).from_config(config).eval()

    def train(self, model: nn.Module, stage: str) -> None:
        """Let the stage's parameters train, and nothing else."""
        blocks = [name for name, _ in model.named_modules() if re.fullmatch(self.blocks, name)]
        count = {"head": 0, "last": 1, "half": len(blocks) // 2, "all but the first": len(blocks) - 1}[stage]
        chosen = blocks[len(blocks) - count :]
        head = [name for name, _ in model.named_modules() if re.fullmatch(self.head, name)]
        assert blocks
        assert head
        model.requires_grad_(False)
        for name in (*chosen, *head):
            model.get_submodule(name).requires_grad_(True)


STAGES = ("head", "last", "half", "all but the first")


def numbers(*shape: int, top: int = 90) -> Tensor:
    return torch.randint(5, top, shape, generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text(**more: Tensor) -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = mask[2, 4:] = 0
    return {"input_ids": numbers(3, 9) * mask, "attention_mask": mask, **more}


def classes() -> dict[str, Tensor]:
    return text(labels=torch.tensor([0, 1, 1]))


def tokens() -> dict[str, Tensor]:
    batch = text()
    return batch | {"labels": (batch["input_ids"] % 2).masked_fill(batch["attention_mask"] == 0, -100)}


def spans() -> dict[str, Tensor]:
    return text(start_positions=torch.tensor([1, 2, 0]), end_positions=torch.tensor([3, 4, 2]))


def language() -> dict[str, Tensor]:
    batch = text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def pairs() -> dict[str, Tensor]:
    return text(labels=numbers(3, 5))


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": noise(3, 3, 32, 32), "labels": torch.tensor([0, 1, 1])}


def large_pictures() -> dict[str, Tensor]:
    return {"pixel_values": noise(3, 3, 64, 64), "labels": torch.tensor([0, 1, 1])}


def masks() -> dict[str, Tensor]:
    return {"pixel_values": noise(2, 3, 64, 64), "labels": numbers(2, 64, 64, top=7) % 2}


def captions() -> dict[str, Any]:
    return text(pixel_values=noise(3, 3, 32, 32)) | {"return_loss": True}


def sound() -> dict[str, Tensor]:
    return {"input_values": noise(3, 400), "labels": torch.tensor([0, 1, 1])}


def speech() -> dict[str, Tensor]:
    return {"input_values": noise(3, 400), "labels": numbers(3, 4, top=19)}


def spectra() -> dict[str, Tensor]:
    return {"input_features": noise(3, 16, 64), "labels": numbers(3, 5)}


def spectrograms() -> dict[str, Tensor]:
    return {"input_values": noise(3, 32, 16), "labels": torch.tensor([0, 1, 1])}


LM, MLM, TOKENS = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForTokenClassification"
S2S, IMAGE, ANSWER = "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModelForQuestionAnswering"
AUDIO = "AutoModelForAudioClassification"
TIED = dict.fromkeys(STAGES, "tied")
BERT = (TEXT, r"\w+\.encoder\.layer\.\d+")


def decoder(name: str, settings: Mapping[str, Any] = UNTIED, **more: Any) -> Family:
    head = r"lm_head|model\.norm"
    return Family(f"{name} lm", settings, r"model\.layers\.\d+", head, language, LM, ragged=True, **more)


FAMILIES = [
    Family("Bert cls", *BERT, r"classifier|bert\.pooler", classes, ragged=True, slow=False),
    Family("Bert tokens", *BERT, "classifier", tokens, TOKENS, ragged=True),
    Family("Bert answers", *BERT, "qa_outputs", spans, ANSWER),  # its loss reads padding too
    Family("Bert mlm", *BERT, "cls", language, MLM, refused=TIED, slow=False),
    Family("Roberta cls", TEXT | {"pad_token_id": 1}, BERT[1], "classifier", classes, ragged=True),
    Family("Roberta tokens", TEXT | {"pad_token_id": 1}, BERT[1], "classifier", tokens, TOKENS, ragged=True),
    Family("Electra cls", TEXT | {"embedding_size": 32}, BERT[1], "classifier", classes, ragged=True),
    Family("MPNet cls", TEXT, BERT[1], "classifier", classes, ragged=True),
    Family(
        "DistilBert cls",
        {"vocab_size": 99, "dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64},
        r"distilbert\.transformer\.layer\.\d+", "classifier|pre_classifier", classes, ragged=True, slow=False,
    ),
    Family("Albert cls", TEXT | {"embedding_size": 16}, r".*albert_layers\.0", r"classifier|albert\.pooler", classes,
           ragged=True, refused={"last": "2%"}),
    Family("ModernBert cls", TEXT | {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
           r"model\.layers\.\d+", r"model\.final_norm|head|classifier", classes, ragged=True),
    Family("DebertaV2 cls", TEXT | {"relative_attention": True, "position_buckets": 8, "conv_kernel_size": 3,
           "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"], "share_att_key": True},
           BERT[1], r"classifier|pooler", classes, ragged=True, slow=False),
    Family("GPT2 lm", {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64},
           r"transformer\.h\.\d+", r"transformer\.ln_f", language, LM, ragged=True, slow=False),
    Family("GPT2 tied", {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64},
           r"transformer\.h\.\d+", r"lm_head|transformer\.wte", language, LM, refused=TIED),
    Family("GPT2 cls", {"vocab_size": 99, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64,
           "pad_token_id": 0}, r"transformer\.h\.\d+", "score", classes, ragged=True),
    Family("GPTNeoX lm", UNTIED, r"gpt_neox\.layers\.\d+", r"embed_out|lm_head|gpt_neox\.final_layer_norm", language,
           LM, ragged=True),
    Family("OPT lm", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
           "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
           r"model\.decoder\.layers\.\d+", r"model\.decoder\.final_layer_norm", language, LM, ragged=True),
    Family("Bloom cls", {"vocab_size": 99, "hidden_size": 32, "n_layer": 4, "n_head": 2, "pad_token_id": 0},
           r"transformer\.h\.\d+", r"score|transformer\.ln_f", classes, ragged=True),
    decoder("Llama", slow=False),
    Family("Llama cls", UNTIED, r"model\.layers\.\d+", r"score|model\.norm", classes, ragged=True),
    decoder("Qwen2"),
    decoder("Qwen3"),
    decoder("Qwen3Moe", UNTIED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    decoder("Mistral"),
    decoder("Gemma"),
    decoder("Gemma2", UNTIED | {"sliding_window": 8}),
    Family("Gemma3Text lm", UNTIED | {"sliding_window": 8}, r"model\.layers\.\d+", r"lm_head|model\.norm", language, LM,
           ragged=True),
    decoder("Phi3"),
    decoder("Olmo2"),
    Family("T5 s2s", {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 2,
           "decoder_start_token_id": 0}, r"decoder\.block\.\d+", r"decoder\.final_layer_norm", pairs, S2S, slow=False),
    Family("T5 tied", {"vocab_size": 99, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
           "decoder_start_token_id": 0}, r"decoder\.block\.\d+", "lm_head", pairs, S2S, refused=TIED),
    Family("Bart s2s", {"vocab_size": 99, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
           "max_position_embeddings": 64, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3},
           r"model\.(en|de)coder\.layers\.\d+", r"none|model\.decoder\.layers\.3\.final_layer_norm", pairs, S2S,
           slow=False),
    Family("Whisper s2s", {"vocab_size": 99, "d_model": 32, "encoder_layers": 4, "decoder_layers": 4,
           "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
           "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None},
           r"model\.decoder\.layers\.\d+", r"model\.decoder\.layer_norm", spectra, "AutoModelForSpeechSeq2Seq"),
    Family("ViT cls", PICTURE, r"vit\.layers\.\d+", r"classifier|vit\.layernorm", pictures, IMAGE, slow=False),
    Family("DeiT cls", PICTURE | {"architectures": ["DeiTForImageClassification"]}, r"deit\.(encoder\.)?layers?\.\d+",
           r"classifier|deit\.layernorm", pictures, IMAGE),
    Family("Beit cls", PICTURE, r"beit\.(encoder\.)?layers?\.\d+", r"classifier|beit\.pooler", pictures, IMAGE),
    Family("Dinov2 cls", PICTURE, r"dinov2\.(encoder\.)?layers?\.\d+", r"classifier|dinov2\.layernorm", pictures,
           IMAGE),
    Family("CLIP images", {"vision_config": PICTURE, "text_config": TEXT | {"eos_token_id": 2}},
           r"vision_model\.encoder\.layers\.\d+", "classifier", pictures, IMAGE),
    Family("CLIP pairs", {"vision_config": PICTURE, "text_config": TEXT | {"eos_token_id": 2}, "projection_dim": 16},
           r"text_model\.encoder\.layers\.\d+", r"text_projection|text_model\.final_layer_norm", captions, "AutoModel",
           slow=False),
    Family("Swin cls", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 2],
           "window_size": 4}, r"swin\.encoder\.layers\.\d+", r"classifier|swin\.layernorm", pictures, IMAGE),
    Family("ResNet cls", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
           "layer_type": "basic"}, r"resnet\.encoder\.stages\.\d+", "classifier", pictures, IMAGE, slow=False),
    Family("ConvNext cls", {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
           r"convnext\.encoder\.stages\.\d+", r"classifier|convnext\.layernorm", large_pictures, IMAGE),
    Family("MobileNetV2 cls", {"image_size": 32, "depth_multiplier": 0.25}, r"mobilenet_v2\.layer\.\d+",
           r"classifier|mobilenet_v2\.conv_1x1", pictures, IMAGE),
    Family("EfficientNet cls", {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.2,
           "hidden_dim": 256}, r"efficientnet\.encoder\.blocks\.\d+", "classifier", pictures, IMAGE),
    Family("Segformer masks", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32],
           "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16}, r"segformer\.stages\.\d+",
           "decode_head", masks, "AutoModelForSemanticSegmentation", slow=False),
    Family("Wav2Vec2 cls", SOUND, r"wav2vec2\.encoder\.layers\.\d+", "classifier|projector", sound, AUDIO, slow=False),
    Family("Wav2Vec2 ctc", SOUND, r"wav2vec2\.encoder\.layers\.\d+", "lm_head", speech, "AutoModelForCTC"),
    Family("Hubert cls", SOUND, r"hubert\.encoder\.layers\.\d+", "classifier|projector", sound, AUDIO),
    Family("AST cls", PICTURE | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8,
           "time_stride": 8}, r"audio_spectrogram_transformer\.(encoder\.)?layers?\.\d+",
           r"classifier|audio_spectrogram_transformer\.layernorm", spectrograms, AUDIO),
]  # fmt: skip
