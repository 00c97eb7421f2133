"""Layers that are left out at random: each device leaves out others, and two train what one does; FSDP2 is refused."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import senses
import staged
import tiny
from test_shards import spread

from engine.devices import layerdrop

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
STAGES = [{"name": "top", "unfreeze": "@blocks", "steps": 3}]
RECIPE = {"task": "audio-classification", "freeze": "wav2vec2", "stages": STAGES, "batch_size": 8}


def place(root: Path, **recipe: object) -> Path:
    senses.tones(root / "rows")
    senses.save_sound_model(senses.wav2vec2(layerdrop=0.5), root / "model")
    staged.write(root, **RECIPE, **recipe)
    return root


def test_who_leaves_layers_out():
    model = senses.wav2vec2(layerdrop=0.5)
    assert list(layerdrop.droppers(model)) == ["wav2vec2.encoder"]
    with layerdrop.every_layer(model):
        assert layerdrop.droppers(model) == {}
    assert model.config.layerdrop == 0.5
    assert layerdrop.droppers(tiny.bert()) == {}


def test_two_devices_leave_out_what_one_does(tmp_path: Path):
    """Half of all layers: DDP would wait for their gradients, and one of two would end in a traceback."""
    one, two = place(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(one, two)
    assert staged.run(one) == [0], staged.said(one)
    assert staged.run(two, ranks=2) == [0, 0], staged.said(two)
    assert staged.equal(staged.weights(one), staged.weights(two))


@pytest.mark.slow
def test_spread_over_devices_it_is_refused(tmp_path: Path):
    root, plant = place(tmp_path), partial(spread, layer="Wav2Vec2EncoderLayerStableLayerNorm")
    assert staged.run(root, ranks=2, plant=plant) == [2, 2], staged.said(root)
    assert "`wav2vec2.encoder` leaves layers out at random (layerdrop)" in staged.said(root)
    assert staged.said(root, 1) == ""
