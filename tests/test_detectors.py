"""Detectors beside DETR and YOLOS: what `AutoModelForObjectDetection` knows trains as it comes, through a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import running
import test_tasks_object_detection as scenes
import transformers

from engine.records import Evaluated, Proved, Step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

SMALL: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5, "num_labels": 2}
SMALL |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
SMALL |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32)
DETR = SMALL | {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "dropout": 0.0}
RT = SMALL | {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32]}
RT |= {"num_denoising": 0}
KINDS = {
    "ConditionalDetr": ("ResNet", ["stage4"], DETR),
    "DabDetr": ("ResNet", ["stage4"], DETR | {"hidden_size": 32}),
    "TableTransformer": ("ResNet", ["stage4"], DETR),
    "RTDetr": ("RTDetrResNet", ["stage2", "stage3", "stage4"], RT),
    "RTDetrV2": ("RTDetrResNet", ["stage2", "stage3", "stage4"], RT),
}
"""Kind -> its backbone, the maps that it reads of that, and what makes it small."""


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_through_a_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    backbone, maps, sizes = KINDS[kind]
    small = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    settings = getattr(transformers, f"{backbone}Config")(out_features=maps, **small)
    config = getattr(transformers, f"{kind}Config")(backbone_config=settings, **sizes)
    root = scenes.place(tmp_path, scenes.seeded(getattr(transformers, f"{kind}ForObjectDetection"), config))
    if kind.startswith("RT"):
        size = {"height": scenes.SIDE, "width": scenes.SIDE}
        transformers.RTDetrImageProcessorPil(size=size).save_pretrained(root / "model")
    training = {"logging_steps": 2, "max_grad_norm": 0.1}
    happened = running.run(
        root, task="object-detection", stages=[running.stage(steps=6, learning_rate=1e-3)], training=training
    )
    losses = [event.loss for event in running.events(happened, Step)]
    assert losses[-1] < losses[0]
    assert set(running.events(happened, Evaluated)[-1].metrics) == {"loss", "map", "map_50", "map_75", "mar_100"}
    assert running.events(happened, Proved)
