# a public script for the last layer of DeepSeek-V3.2; repository not recorded
TRAINABLE_REGEX="model\.layers\.60\.|lm_head|model\.norm"

megatron sft \
  --model model \
  --train_type full \
  --dataset data \
  --freeze_parameters_ratio 1 \
  --trainable_parameters_regex "${TRAINABLE_REGEX}" \
  --tensor_model_parallel_size 16
