"""What each signal says of weights, gradients and features whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import nn

from engine.advising.units import Unit
from engine.signals import SIGNALS, Evidence, Gradients
from engine.signals.auto_rgn import AutoRGN
from engine.signals.bypass import Bypass
from engine.signals.cross_half_gain import CrossHalfGain
from engine.signals.fim import FIM
from engine.signals.gsnr import GSNR
from engine.signals.kappa import Kappa
from engine.signals.linear_probe import LinearProbe, majority, narrow, probe, standard
from engine.signals.spectrum import Spectrum


class Two(nn.Module):
    """Two linear layers of 8, the units `a` and `b`."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        for layer in (self.a, self.b):
            layer.weight.data = torch.randn(8, 8, generator=generator)


UNITS = tuple(Unit(name, "", (f"{name}.weight",), 64, name) for name in "ab")


def gradients(one: Mapping[str, float], other: Mapping[str, float], square: float = 1.0) -> Evidence:
    """Evidence of constant gradients in two halves."""
    halves = tuple(
        {f"{name}.weight": torch.full((8, 8), value) for name, value in half.items()} for half in (one, other)
    )
    squares = {f"{name}.weight": torch.full((8, 8), square) for name in one}
    return Evidence(UNITS, Two(), gradients=Gradients((halves[0], halves[1]), squares, 4))


def test_cross_half_gain_is_what_both_halves_agree_on() -> None:
    seen = gradients({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": -0.5}, square=0.25)
    found = CrossHalfGain().measure(seen)
    assert found["a"] == pytest.approx(64 * 0.25 / 0.5)
    assert found["b"] == pytest.approx(-found["a"])


def test_gsnr_is_the_share_that_rows_agree_on() -> None:
    found = GSNR().measure(gradients({"a": 0.5, "b": 0.1}, {"a": 0.5, "b": 0.1}))
    assert found["a"] == pytest.approx(0.25 / 0.75)
    assert found["b"] == pytest.approx(0.01 / 0.99)


def test_fisher_is_blind_to_agreement_and_rgn_to_noise() -> None:
    seen = gradients({"a": 0.5, "b": 0.1}, {"a": 0.5, "b": 0.1})
    assert FIM().measure(seen) == {"a": pytest.approx(64.0), "b": pytest.approx(64.0)}
    weights = seen.model.get_parameter("a.weight").detach()
    assert AutoRGN().measure(seen)["a"] == pytest.approx(0.5 * 8 / float(weights.norm()))


def test_spectrum_never_sees_the_data_and_depends_on_scale() -> None:
    """Its stated limits: the same for all data, and another number for ten times the weights."""
    model = Two()
    before = Spectrum().measure(Evidence(UNITS, model, np.zeros(4, dtype=np.int64)))
    again = Spectrum().measure(Evidence(UNITS, model, np.ones(9, dtype=np.int64)))
    assert before == again
    model.a.weight.data *= 10
    after = Spectrum().measure(Evidence(UNITS, model))
    assert after["a"] == pytest.approx(before["a"] / 10, rel=1e-4)
    assert after["b"] == before["b"]


def test_kappa_is_pefts_order() -> None:
    model = Two()
    model.b.weight.data = torch.eye(8)
    found = Kappa().measure(Evidence(UNITS, model))
    assert found["b"] > found["a"]


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(120) % 3
    told = np.eye(3)[labels] + draw.normal(0, 0.3, (120, 3))
    noise = draw.normal(size=(120, 3))
    folds = [np.arange(120)[start::4] for start in range(4)]
    seen = Evidence(UNITS, Two(), labels, folds, {"a": noise, "b": told})
    found = LinearProbe().measure(seen)
    assert found["b"] > 0.9
    assert found["a"] < 0.5
    assert majority(labels, folds) <= 1 / 3 + 1e-9
    assert probe(standard(told), labels, folds).loss < probe(standard(noise), labels, folds).loss


def test_what_is_read_better_without_a_unit_is_suspect() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(120) % 3
    told, blurred = (np.eye(3)[labels] + draw.normal(0, noise, (120, 3)) for noise in (0.3, 0.8))
    folds = [np.arange(120)[start::4] for start in range(4)]
    without = {"a": told, "b": draw.normal(size=(120, 3))}
    found = Bypass().measure(Evidence(UNITS, Two(), labels, folds, {"b": blurred}, without))
    assert found["a"] > 2
    assert found["b"] < -2
    assert Bypass().measure(Evidence(UNITS, Two(), labels, folds, {"b": blurred})) == {}


def test_wide_features_are_narrowed_without_labels() -> None:
    given = np.random.default_rng(0).normal(size=(30, 20))
    given[:, 0] *= 50
    found = narrow(given, 2)
    assert found.shape == (30, 2)
    assert abs(np.corrcoef(found[:, 0], given[:, 0])[0, 1]) > 0.99


def test_every_signal_says_where_it_comes_from_and_what_it_cannot_see() -> None:
    for kind in SIGNALS:
        assert kind.__doc__
        assert kind.title
        assert kind.paper
        assert kind.limits
        assert kind.needs in ("features", "bypass", "gradients", "weights")
    names = [kind().name for kind in SIGNALS]  # pyright: ignore
    assert len(set(names)) == len(names)
