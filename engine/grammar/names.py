"""What other tools call the keys of a recipe, so that whoever comes from there is told our word.

None of these names is ever accepted; they only answer "no such key". Plain tables, no logic.
"""

from __future__ import annotations

KEYS: dict[str, str] = {
    # transformers.TrainingArguments
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "n_epochs": "epochs",
    "epoch": "epochs",
    "max_steps": "steps",
    "num_steps": "steps",
    "train_steps": "steps",
    "per_device_train_batch_size": "per_device_batch_size",
    "per_gpu_train_batch_size": "per_device_batch_size",
    "micro_batch_size": "per_device_batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "batchsize": "batch_size",
    "bs": "batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "per_gpu_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "warmup_ratio": "warmup_steps",
    "warmup": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "lr_schedule": "lr_scheduler_type",
    "decay": "weight_decay",
    "wd": "weight_decay",
    "optimizer": "optim",
    "optimiser": "optim",
    "optimizer_type": "optim",
    "gradient_clipping": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "clip": "max_grad_norm",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "epsilon": "adam_epsilon",
    "label_smoothing": "label_smoothing_factor",
    "gradient_checkpointing": "activation_checkpointing",
    "layerwise_lr_decay": "layer_decay",
    "layer_lr_decay": "layer_decay",
    "llrd": "layer_decay",
    "lr_decay": "learning_rate_decay",
    "group_by_length": "train_sampling_strategy",
    "log_every": "logging_steps",
    "random_seed": "seed",
    "data_seed": "seed",
    # evaluation
    "eval": "evaluation",
    "metric": "evaluation.metric",
    "metrics": "evaluation.metrics",
    "metric_for_best_model": "evaluation.metric",
    "compute_metrics": "evaluation.metrics",
    "eval_steps": "evaluation.eval_steps",
    "patience": "early_stopping.patience",
    "early_stopping_patience": "early_stopping.patience",
    "early_stopping_threshold": "early_stopping.min_delta",
    "early_stop": "early_stopping",
    "load_best_model_at_end": "restore_best",
    # the model and the data
    "model_name_or_path": "model",
    "model_name": "model",
    "model_id": "model",
    "base_model": "model",
    "pretrained_model_name_or_path": "model",
    "checkpoint": "model",
    "name_or_path": "path",
    "torch_dtype": "dtype",
    "model_revision": "model.revision",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "dataset_config_name": "data.name",
    "dataset_config": "data.name",
    "config_name": "name",
    "subset": "name",
    "train_file": "data.data_files",
    "validation_file": "data.data_files",
    "test_file": "data.data_files",
    "files": "data_files",
    "data_dir": "path",
    "split": "splits",
    "val_set_size": "data.splits.validation",
    "validation_split": "data.splits.validation",
    "val": "validation",
    "eval_split": "validation",
    "text_column": "data.columns",
    "label_column": "data.columns",
    "column_mapping": "data.columns",
    "columns_mapping": "data.columns",
    "task_type": "task",
    "max_seq_length": "task.max_length",
    "max_seq_len": "task.max_length",
    "sequence_len": "task.max_length",
    "model_max_length": "task.max_length",
    "cutoff_len": "task.max_length",
    "doc_stride": "task.stride",
    "mlm_prob": "task.mlm_probability",
    "masking_ratio": "task.mlm_probability",
    "pooling_mode": "task.pooling",
    # what stays frozen and what trains
    "unfrozen_parameters": "unfreeze",
    "trainable_parameters": "unfreeze",
    "trainable_layers": "unfreeze",
    "trainable": "unfreeze",
    "thaw": "unfreeze",
    "freeze_parameters": "freeze",
    "frozen_parameters": "freeze",
    "freeze_layers": "freeze",
    "frozen_layers": "freeze",
    "layers_to_freeze": "freeze",
    "layers_to_freeze_regex": "freeze",
    "freeze_base_model": "freeze",
    "freeze_backbone": "freeze",
    "frozen": "freeze",
    "unfrozen": "unfreeze",
    "phases": "stages",
    "schedule": "stages",
    "fine_tuning_schedule": "stages",
    "adapter": "adapters",
    "lora": "adapters",
    "peft": "adapters",
    "peft_config": "adapters",
    "lora_config": "adapters",
    "base": "extends",
    "defaults": "extends",
    "inherit": "extends",
    "include": "extends",
    "_base_": "extends",
    "cache_activations": "cache",
}
"""Another tool's key -> ours: a key, or the path of one."""

_ANSWERS: dict[str, str] = {
    "it belongs to `accelerate config`; a recipe is the same on every machine": (
        "fp16 bf16 tf32 mixed_precision precision half_precision_backend fp16_opt_level device devices "
        "device_map no_cuda use_cpu cpu gpus num_gpus num_processes fsdp fsdp_config deepspeed ddp "
        "parallelism_config local_rank torch_compile strategy fsdp_transformer_layer_cls_to_wrap "
        "dataloader_num_workers tpu_num_cores use_mps_device"
    ),
    "code of a checkpoint never runs here": ("trust_remote_code"),
    "the environment says where downloads lie: `HF_HOME`": ("cache_dir hub_cache"),
    "the run folder is chosen on the command line": (
        "output_dir out_dir output logging_dir run_name overwrite_output_dir"
    ),
    "a recipe uploads nothing; upload the run's `model/` folder with `hf upload`": (
        "push_to_hub hub_model_id hub_private_repo hub_strategy hub_revision"
    ),
    "a recipe is shared, so it holds no secrets; log in with `hf auth login`": (
        "hub_token push_to_hub_token token use_auth_token api_key wandb_api_key password"
    ),
    "every run keeps its own `metrics.jsonl` and `report.html`": (
        "report_to wandb wandb_project wandb_entity wandb_run_name project logger log_with mlflow tensorboard "
        "trackio comet"
    ),
    "it happens at the end of each epoch, or every `evaluation.eval_steps` steps": (
        "eval_strategy evaluation_strategy do_eval do_train evaluate_during_training"
    ),
    "checkpoints are kept and rotated by themselves": (
        "save_strategy save_steps save_total_limit save_safetensors save checkpoint_dir"
    ),
    "it follows from `batch_size`, which counts all devices, and `per_device_batch_size`": (
        "gradient_accumulation_steps gradient_accumulation accumulation_steps accumulate_grad_batches"
    ),
    "memory is looked after by itself: a batch that doesn't fit is taken in smaller parts": (
        "use_cache auto_find_batch_size"
    ),
    "write `model: {quantization_config: {quant_method: bitsandbytes, load_in_4bit: true}}`": (
        "load_in_8bit load_in_4bit quantization_config quantization quantize"
    ),
    "write `adapters: [{type: lora, r: 8, lora_alpha: 16}]`": (
        "lora_r lora_alpha lora_dropout lora_rank lora_target_modules lora_target_linear"
    ),
    "it belongs to an adapter: `adapters: [{type: lora, target_modules: [...]}]`": (
        "target_modules exclude_modules modules_to_save"
    ),
    "the labels are read from the data": ("num_labels id2label label2id label_names labels"),
    "the model brings its own": ("tokenizer tokenizer_name processor processing_class feature_extractor"),
    'write which: `freeze: "@blocks[:6]"`': (
        "freeze_trainable_layers num_layers_to_freeze freeze_ratio num_freeze_layers"
    ),
    "a stage ends after `epochs` or `steps`, or earlier by `early_stopping`": ("until every when"),
    "a recipe is data and names no code": ("_target_ class_path init_args import plugins _component_"),
    "write `training: {optim: adafactor}`": ("adafactor"),
    "a run that was cut short goes on by itself; `--fresh` starts over": ("resume resume_from_checkpoint auto_resume"),
    "each metric knows by itself which way is better": ("greater_is_better"),
    "write `data: {path: ..., streaming: true}`, and `steps` for every stage": ("streaming"),
    "write `training.train_sampling_strategy`: `random`, `sequential` or `group_by_length`": ("shuffle"),
}

ELSEWHERE: dict[str, str] = {name: answer for answer, names in _ANSWERS.items() for name in names.split()}
"""Another tool's key that no recipe has -> where what it did is found instead."""

ADAPTER_KEYS: dict[str, str] = {
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "lora_scale": "lora_alpha",
    "dropout": "lora_dropout",
    "target": "target_modules",
    "targets": "target_modules",
    "target_module": "target_modules",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "modules": "target_modules",
    "except": "exclude_modules",
    "exclude": "exclude_modules",
    "exclude_module": "exclude_modules",
    "peft_type": "type",
    "name": "type",
    "method": "type",
}
"""What people write in an adapter -> PEFT's own name of the field."""

VALUES: dict[str, str] = {
    "sequence-classification": "text-classification",
    "sentiment-analysis": "text-classification",
    "text_classification": "text-classification",
    "classification": "text-classification",
    "seq_cls": "text-classification",
    "ner": "token-classification",
    "pos": "token-classification",
    "causal-lm": "text-generation",
    "causal_lm": "text-generation",
    "language-modeling": "text-generation",
    "clm": "text-generation",
    "mlm": "fill-mask",
    "asr": "automatic-speech-recognition",
    "summarisation": "summarization",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "adam": "adamw_torch",
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adam8bit": "adamw_bnb_8bit",
    "ulmfit": "gradual",
    "gradual_unfreezing": "gradual",
    "lpft": "lp_ft",
    "lp-ft": "lp_ft",
    "linear_probe": "lp_ft",
    "chain-thaw": "chain_thaw",
    "wsd": "warmup_stable_decay",
    "cosine_annealing": "cosine",
    "on": "auto",
}
"""What people write as a value -> the value that means it here, where that place knows it."""

EXAMPLES: dict[str, str] = {
    "model": "model: distilbert/distilbert-base-uncased",
    "task": "task: text-classification",
    "data": "data: stanfordnlp/imdb",
    "name": "name: head",
    "path": "path: ...",
    "type": "type: ...",
}
"""Required key -> how it is written."""
