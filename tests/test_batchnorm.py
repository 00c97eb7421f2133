"""BatchNorms that train remember the same on one device and on two, and the same on each of the two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import senses
import staged
import tiny
import torch
from torch import nn

from engine.devices.batchnorm import Statistics

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Alone:
    """One device, as far as a gathering goes."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.mark.parametrize("momentum", [0.1, None])
def test_in_order_it_is_what_torch_remembers(momentum: float | None):
    torch.manual_seed(0)
    norm, plain = nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    statistics = Statistics(norm)
    for _ in range(2):
        statistics.begin()
        for counts in (True, True, False):
            batch = torch.randn(8, 3)
            with statistics.taking(counts):
                norm(batch)
            if counts:
                plain(batch)
        statistics.end(Alone())
    assert norm.momentum == momentum
    assert norm.num_batches_tracked == plain.num_batches_tracked == 4
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())


def test_a_step_that_is_taken_anew_counts_once():
    norm = nn.BatchNorm1d(3)
    statistics, batch = Statistics(norm), torch.randn(8, 3)
    for _ in range(2):
        statistics.begin()
        with statistics.taking(True):
            norm(batch)
    statistics.end(Alone())
    torch.testing.assert_close(norm.running_mean, 0.1 * batch.mean(0))
    assert norm.num_batches_tracked == 1


def test_frozen_ones_count_nothing():
    assert Statistics(nn.BatchNorm1d(3).eval()).norms == []


STAGES = [{"name": "head", "steps": 2}, {"name": "top", "unfreeze": "@blocks[-2:]", "steps": 4}]
RECIPE = {"task": "image-classification", "freeze": "resnet", "stages": STAGES, "batch_size": 8}


@pytest.mark.slow
def test_two_devices_remember_what_one_does(tmp_path: Path):
    one, two = tmp_path / "one", tmp_path / "two"
    senses.pictures(one / "rows")
    senses.save_picture_model(tiny.resnet(3), one / "model")
    staged.write(one, **RECIPE)
    shutil.copytree(one, two)
    assert staged.run(one) == [0], staged.said(one)
    assert staged.run(two, ranks=2, plant=lambda rank: staged.write_boundaries(two, rank)) == [0, 0], staged.said(two)
    assert (two / "boundaries-0").read_text() == (two / "boundaries-1").read_text()
    assert any("running_mean" in name for name in staged.weights(one))
    assert staged.equal(staged.weights(one), staged.weights(two))
