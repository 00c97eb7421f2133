# a public script for the last layer of DeepSeek-V3.2, repository not recorded; its expression, for a model of 28 layers
TRAINABLE_REGEX="model\.layers\.27\.|lm_head|model\.norm|model\.final_layernorm"

swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type full \
    --dataset data/train.jsonl \
    --freeze_parameters_ratio 1 \
    --trainable_parameters_regex "${TRAINABLE_REGEX}" \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --learning_rate 2e-5 \
    --max_length 4096
