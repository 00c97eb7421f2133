# a public script that warms up new tokens before LoRA (train_swift_phase1.sh); repository not recorded
swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --tuner_type full \
    --freeze_parameters_regex "model\.layers|model\.norm" \
    --dataset data/swift/train.jsonl \
    --val_dataset data/swift/val.jsonl \
    --learning_rate 1e-3 \
    --max_steps 500 \
    --optim adafactor \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --max_length 512
