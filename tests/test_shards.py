"""FSDP2 on CPUs: spread over two processes, a staged run ends in the weights of one, and goes on from its checkpoints.

accelerate promotes to FSDP on accelerators only; here it is told that gloo's processes are such.
"""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import accelerate
import pytest
import senses
import staged
from accelerate.utils import DistributedType

from engine import learner
from engine.devices import processes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def spread(_rank: int = 0, layer: str = "BertLayer") -> None:
    """Have a rank find FSDP2 as it would on accelerators, for a model of such layers."""

    def accelerator(cpu: bool, **more: object) -> accelerate.Accelerator:
        accelerate.PartialState(cpu=cpu)
        accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
            cpu_ram_efficient_loading=False,
        )
        return accelerate.Accelerator(fsdp_plugin=plugin, **more)

    processes.Accelerator = accelerator


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows that nothing has been trained on."""
    return staged.place(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = staged.place(tmp_path_factory.mktemp("one"))
    assert staged.run(root) == [0]
    return root


def apart(one: Path, other: Path) -> float:
    """The largest difference between two models' weights."""
    first, second = staged.weights(one), staged.weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def shares(root: Path) -> staged.Plant:
    """Have each rank write down how many elements it trains itself, and how many there are."""

    def count() -> None:
        held = [parameter for group in learning[0].optimizer.param_groups for parameter in group["params"]]
        mine, all_of_them = sum(each.to_local().numel() for each in held), sum(each.numel() for each in held)
        (root / f"share-{os.environ['RANK']}").write_text(json.dumps([mine, all_of_them]))

    learning: list[learner.Learner] = []

    def plant(rank: int) -> None:
        spread()
        step = learner.Learner.step

        def watched(self: learner.Learner, number: int) -> float:
            learning[:] = [self]
            return step(self, number)

        learner.Learner.step = watched
        staged.at_step(9, count, rank)(rank)

    return plant


def told(root: Path) -> list[dict[str, object]]:
    """What the records say, without what is rounded in another order or depends on whether anything is replayed."""
    varies = {"loss", "gradient_norm", "metrics", "frozen", "replayed", "moved"}
    return [{key: value for key, value in event.items() if key not in varies} for event in staged.history(root)]


def test_a_short_stage_with_adapters(tmp_path: Path):
    stages = [staged.STAGES[1] | {"steps": 2}]
    one = staged.place(tmp_path / "one", stages=stages)
    two = staged.fresh(one, tmp_path / "two", stages=stages)
    assert staged.run(one) == [0]
    assert staged.run(two, ranks=2, plant=spread) == [0, 0], staged.said(two) + staged.said(two, 1)
    assert apart(one, two) < 1e-6


@pytest.mark.slow
def test_spread_is_one_and_goes_on_as_it_was(one: Path, tmp_path: Path):
    """Stopped in the stage with adapters; each holds half of what trains; the proof is the same as that of one."""
    root = staged.fresh(one, tmp_path)

    def stopped(rank: int) -> None:
        spread()
        staged.signal_at(6, signal.SIGTERM, rank=1)(rank)

    assert staged.run(root, ranks=2, plant=stopped) == [143, 143], staged.said(root)
    assert staged.run(root, ranks=2, plant=shares(root)) == [0, 0], staged.said(root) + staged.said(root, 1)
    (first, all_of_them), (second, again) = (json.loads((root / f"share-{rank}").read_text()) for rank in (0, 1))
    assert first + second == all_of_them == again
    assert abs(first - second) < all_of_them / 4
    assert apart(one, root) < 1e-6
    assert told(one) == told(root)


@pytest.mark.slow
def test_a_run_goes_on_spread_or_not(one: Path, tmp_path: Path):
    """Two spread ones, one alone, two that are not, one alone, two spread ones; a kill in between."""
    root = staged.fresh(one, tmp_path)
    turns = [(2, True, 2), (1, False, 2), (2, False, 3), (1, False, 3)]
    for ranks, spreads, steps in turns:

        def stopped(rank: int, spreads: bool = spreads, steps: int = steps) -> None:
            if spreads:
                spread()
            staged.signal_at(steps, signal.SIGTERM)(rank)

        assert staged.run(root, ranks=ranks, plant=stopped) == [143] * ranks, staged.said(root)

    def killed(rank: int) -> None:
        spread()
        staged.signal_at(3, signal.SIGKILL, rank=1)(rank)

    assert staged.run(root, ranks=2, plant=killed) == [3, -signal.SIGKILL], staged.said(root)
    assert staged.run(root, ranks=2, plant=spread) == [0, 0], staged.said(root)
    assert apart(one, root) < 1e-6


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"USE_FSDP": "true"}, "FSDP1 melts the weights of a layer into one"),
        ({"USE_DEEPSPEED": "true"}, "DeepSpeed keeps what it was made for"),
        ({"USE_MEGATRON_LM": "true"}, "Megatron-LM trains models of its own making"),
        ({"USE_PARALLELISM_CONFIG": "true"}, "parallelism split the layers that stages name"),
    ],
)
def test_what_no_run_can_go_by_is_refused_at_once(rows: Path, tmp_path: Path, variables: dict[str, str], says: str):
    root = staged.fresh(rows, tmp_path)

    def plant(rank: int) -> None:
        os.environ |= {f"ACCELERATE_{name}": value for name, value in variables.items()}

    assert staged.run(root, ranks=2, plant=plant) == [2, 2]
    assert says in staged.said(root)
    assert len(staged.said(root).splitlines()) == 1
    assert staged.said(root, 1) == ""
    assert not staged.folder(root).exists()


def test_fsdp_that_accelerate_would_leave_out_is_refused(rows: Path, tmp_path: Path):
    root = staged.fresh(rows, tmp_path)
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    codes = staged.run(root, ranks=2, plant=lambda _: os.environ.update(variables))
    assert codes in ([2, 2], [2, 3]), staged.said(root)
    assert "leave `--use_fsdp` out" in staged.said(root)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no such layers", "no embeddings"])
def test_a_model_that_accelerate_cannot_spread_is_refused(rows: Path, tmp_path: Path, kind: str):
    if kind == "no such layers":
        root, layer, said = staged.fresh(rows, tmp_path), "ViTLayer", "Could not find the transformer layer class"
    else:
        root, layer, said = tmp_path, "Wav2Vec2EncoderLayerStableLayerNorm", "`get_input_embeddings`"
        senses.tones(root / "rows")
        senses.save_sound_model(senses.wav2vec2(layerdrop=0.0), root / "model")
        stages = [{"name": "head", "steps": 2}]
        staged.write(root, task="audio-classification", freeze="wav2vec2", stages=stages)
    assert staged.run(root, ranks=2, plant=partial(spread, layer=layer)) == [2, 2], staged.said(root)
    assert "accelerate can't spread this model by FSDP2" in (last := staged.said(root).splitlines()[-1])
    assert said in last


def test_frozen_weights_of_another_precision_are_refused(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    root = staged.fresh(rows, tmp_path, model={"path": "model", "dtype": "bfloat16"})
    assert staged.run(root, ranks=2, plant=spread) == [2, 2], staged.said(root)
    assert "FSDP2 gathers a layer's weights in one precision" in staged.said(root)
