# a public training script for the multi-token prediction of MiMo-7B; repository not recorded
per_device_batch_size=1
nproc_per_node=8
model_path=/absolute/path/to/model/MiMo-7B-RL
dataset_path=/absolute/path/to/data/dataset.jsonl

NPROC_PER_NODE=$nproc_per_node \
CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \
swift sft \
    --model $model_path \
    --model_type 'mimo' \
    --train_type full \
    --num_train_epochs 3 \
    --dataset $dataset_path \
    --freeze_parameters model,lm_head \
    --trainable_parameters model.mtp_layers \
    --torch_dtype bfloat16 \
    --per_device_train_batch_size $per_device_batch_size \
    --learning_rate 5e-5 \
    --gradient_accumulation_steps 8 \
    --max_length 4096 \
    --warmup_ratio 0.05 \
    --attn_impl flash_attn
