# modelscope/ms-swift: examples/train/tuners/lisa/train.sh
CUDA_VISIBLE_DEVICES=0 \
swift sft \
    --model Qwen/Qwen2.5-7B-Instruct \
    --train_type full \
    --dataset swift/self-cognition#1000 \
    --lisa_activated_layers 2 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --learning_rate 1e-5 \
    --gradient_accumulation_steps 16 \
    --logging_steps 5
