"""Every key a user can write. A recipe is data: frozen, strict, and it knows nothing of the model it names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from engine.adapters import Adapter
from engine.part import Part, Patterns, one_or_many
from engine.schedules import SCHEDULES, StageEntry
from engine.schedules.base import Rate, SchedulerName, Share
from engine.tasks import TASKS

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
]
"""The names of transformers' `OptimizerNames` that keep to `step()`: none that hooks into gradients or needs a mode."""


Tokens = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(one_or_many, json_schema_input_type=str | list[str]),
]


class Model(Part):
    """The pretrained model to start from."""

    shorthand = "path"

    path: str
    """A model of the Hub, a local folder, or `package:NAME/PATH` for one that an installed Python package carries."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    gguf_file: str | None = None
    """Name of a GGUF file there, whose weights are unpacked as they are read."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights in memory; what trains is always float32."""
    frozen_dtype: Literal["bfloat16", "float16"] | None = None
    """Precision of the matrices that no stage trains as weights, `bfloat16` or `float16`: half their memory. Whatever
    trains, the norms and the activations stay float32, and what is saved has those matrices rounded. A processor that
    has no instructions for such products is slower by it."""
    quantization_config: dict[str, Any] | None = None
    """Frozen weights in 8 or 4 bits, in the fields of transformers' own class: `{quant_method: bitsandbytes,
    load_in_4bit: true}`, or `{quant_method: torchao, quant_type: Int8WeightOnlyConfig}`. What a stage trains as weights
    is never quantised; adapters are not merged."""
    attn_implementation: str | None = None
    """How attention is computed: `eager`, `sdpa`, `flash_attention_2`, ..."""
    pad_token: Annotated[str, Field(min_length=1)] | None = None
    """The token that fills short texts up, where the tokenizer names none; one that it doesn't know is added to it."""
    add_tokens: Tokens = ()
    """Words to add to the vocabulary; some stage has to train the embeddings, or they would never mean anything."""
    add_special_tokens: Tokens = ()
    """The same for marks that are no words, such as `<|im_start|>`: a decoder may skip them."""

    @property
    def grows(self) -> bool:
        """Whether tokens are added that have to be learnt."""
        return bool(self.add_tokens or self.add_special_tokens)


class Splits(Part):
    """Which rows train and which rows judge."""

    train: str = "train"
    """Split to train on; slices such as `train[:80%]` work."""
    validation: str | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Split that judges, or the share of the training rows to hold out; if left out, `validation` where the data have
    one, else a tenth of the training rows."""
    test: str | None = None
    """Split that is read once, at the very end."""


class Data(Part):
    """The data set: one of the Hub, files, or files that an installed Python package carries."""

    shorthand = "path"

    path: str
    """A data set of the Hub; a file or folder, also of pictures or sounds; or one of `csv`, `json`, `parquet`, `text`,
    `imagefolder` and `audiofolder`, with `data_files`."""
    name: str | None = None
    """Configuration of a data set of the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    data_files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = None
    """File, files, or a mapping from split to files."""
    streaming: bool = False
    """Whether rows are read as they come, and none of them are kept; every stage then lasts for `steps`."""
    splits: Splits = Splits()
    """Which rows train and which rows judge."""
    columns: dict[str, str] = {}
    """Mapping from the task's column names to those of the data."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows whose picture or recording can't be decoded: the recipe is refused, or they are left out and
    told of."""


class Training(Part):
    """How weights move, in Hugging Face's words; a stage may say otherwise for itself."""

    learning_rate: Rate = 5e-5
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of the weights per step and unit of rate; biases and norms are left out."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    """Steps of linear warm-up; below 1 a share of the stage."""
    lr_scheduler_type: SchedulerName = "linear"
    """How the rate falls over a stage: a name of `transformers.SchedulerType`."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of that schedule."""
    layer_decay: Share = 1.0
    """Rate of each block as a share of the block above it (BEiT 0.65, ULMFiT 1 / 2.6)."""
    optim: OptimizerName = "adamw_torch_fused"
    """Optimizer: a name of `transformers.training_args.OptimizerNames`."""
    optim_args: str | None = None
    """Further arguments of the optimizer, `key=value` with commas between."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Rate = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each label that is spread over all classes."""
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "group_by_length"
    """Order of the examples; grouping by length spares padding, and does nothing where examples have no length."""
    activation_checkpointing: bool = False
    """Whether blocks that gradients pass through compute their activations again instead of keeping them: less memory
    for a forward pass more, and the same gradients."""
    save_steps: Annotated[int, Field(ge=1)] = 500
    """Optimizer steps between two checkpoints; every evaluation and the end of every stage have one as well."""
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Checkpoints to keep, besides the ends of stages that the recipe lists; generated ones are too many to keep."""
    logging_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between two records of the loss."""


class Cache(Part):
    """Whether and how activations of the frozen prefix are kept and replayed."""

    shorthand = "mode"

    mode: Literal["auto", "off"] = "auto"
    """`auto` keeps them where that pays and is exact, `off` never does."""
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """How they are stored; all but float32 trade a little accuracy for disk."""
    budget: Rate = 20.0
    """Gigabytes that the cache may take; what was not used for longest makes room."""


class Evaluation(Part):
    """How a model is judged while it trains."""

    shorthand = "metric"

    metric: str | None = None
    """The metric that decides what is best; the task's first if left out."""
    metrics: Annotated[tuple[str, ...], BeforeValidator(one_or_many, json_schema_input_type=str | list[str])] = ()
    """Further metrics to compute."""
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between evaluations; once an epoch if left out."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Examples per device and batch; the training's own if left out."""


def _named(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _kind(value: Any) -> Any:
    """The tag of a task or of `stages`: a list, or the `type` of what generates one."""
    if isinstance(value, (list, tuple)):
        return "list"
    return value.get("type") if isinstance(value, dict) else getattr(value, "type", None)


def _one_of(parts: tuple[type[Part], ...], *more: Any) -> Any:
    """The union of `parts`, told apart by their `type`."""
    tagged = [Annotated[part, Tag(part.model_fields["type"].annotation.__args__[0])] for part in parts]  # pyright: ignore
    return Annotated[Union[(*more, *tagged)], Discriminator(_kind)]


_Tasks = _one_of(TASKS)
_TaskName = Literal[tuple(task.model_fields["type"].annotation.__args__[0] for task in TASKS)]  # pyright: ignore
AnyTask = Annotated[_Tasks, BeforeValidator(_named, json_schema_input_type=_TaskName | _Tasks)]
Stages = _one_of(SCHEDULES, Annotated[tuple[StageEntry, ...], Tag("list"), Field(min_length=1)])


class Recipe(Part):
    """What a user wrote."""

    model: Model
    """The pretrained model to start from."""
    task: AnyTask
    """What to fine-tune for: a pipeline tag of the Hub, or a mapping with it as `type` and the task's own keys."""
    data: Data
    """The data set to train and judge on."""
    freeze: Patterns = ()
    """Patterns of what starts frozen."""
    adapters: tuple[Adapter, ...] = ()
    """Adapters for the parts that stages unfreeze."""
    stages: Stages = (StageEntry(name="all", epochs=3.0),)  # pyright: ignore[reportInvalidTypeForm]
    """The stages in order, or a mapping whose `type` generates them."""
    training: Training = Training()
    """How weights move."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step, over all devices together."""
    per_device_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Most examples a device takes at once; the rest is gradient accumulation."""
    evaluation: Evaluation = Evaluation()
    """How a model is judged while it trains."""
    cache: Cache = Cache()
    """Whether and how activations of the frozen prefix are kept and replayed."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the head's first weights, the order of the data and every dropout mask."""

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        names = [stage.name for stage in self.stages] if isinstance(self.stages, tuple) else []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are called {twice[0]}; overrides and reports tell stages apart by name")
        return self

    @model_validator(mode="after")
    def _streams_have_steps(self) -> Recipe:
        stages = self.stages if isinstance(self.stages, tuple) else (self.stages,)
        lengths = [getattr(stage, key, None) for stage in stages for key in ("epochs", "head_epochs")]
        if self.data.streaming and any(lengths):
            raise ValueError("a stream has no epochs: give every stage `steps` (a list, where a schedule wants epochs)")
        return self
