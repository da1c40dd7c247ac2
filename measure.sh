#!/usr/bin/env bash
# Measure the notes' figures on this machine: measure.sh LABEL RANKS, with `python` and `deepspeed` on the PATH.
# `make results` calls it; the files it writes are named after LABEL (2cpu, h100, 2xh200).
set -eu
label=$1 ranks=$2
record() { python -m tests.record "$@"; }

record "day01/results/check_env_$label.json" python day01/check_env.py
record "day01/results/train_$label.json" python day01/train.py
record "day01/results/hello_$label.json" deepspeed --num_accelerators "$ranks" day01/hello_distributed.py
record "day02/results/train_$label.json" deepspeed --num_accelerators "$ranks" day02/train.py
record "day03/results/train_$label.json" deepspeed --num_accelerators "$ranks" day03/train.py \
    --deepspeed_config day03/ds_config_cosine.json

mkdir -p day03/results day04/results
compare=(python day03/compare.py --ranks "$ranks" --run_dir "runs/results/day03_$label")
if nvidia-smi >/dev/null 2>&1; then # precision is a GPU's subject, and takes a model that keeps it busy
    compare+=(--model gpt2 --steps 100 --configs)
    for name in "" _fused_adam _bf16 _fp16 _autocast; do compare+=("day03/ds_config$name.json"); done
fi
"${compare[@]}"
cp "runs/results/day03_$label/compare.json" "day03/results/compare_$label.json"
for plot in loss speed; do cp "runs/results/day03_$label/$plot.png" "day03/results/${plot}_$label.png"; done

record "day04/results/train_$label.json" deepspeed --num_accelerators "$ranks" day04/train.py \
    --steps 100 --set zero_optimization.stage=2 gradient_accumulation_steps=2
printf '{"train_micro_batch_size_per_gpu": 8, "gradient_cliping": 0.5, "stage": 2}\n' >my.json
record --fails "day04/results/check_$label.json" python config/check.py my.json
rm my.json
python day04/tune.py --ranks "$ranks" --run_dir "runs/results/day04_$label"
cp "runs/results/day04_$label/tune.json" "day04/results/tune_$label.json"
cp "runs/results/day04_$label/speed.png" "day04/results/tune_$label.png"

mkdir -p day05/results day06/results day07/results
record "day05/results/train_$label.json" deepspeed --num_accelerators "$ranks" day05/train.py
record "day05/results/train_bf16_$label.json" deepspeed --num_accelerators "$ranks" day05/train.py \
    --deepspeed_config day05/ds_config_bf16.json
record "day06/results/train_$label.json" deepspeed --num_accelerators "$ranks" day06/train.py
record "day06/results/train_zero1_$label.json" deepspeed --num_accelerators "$ranks" day06/train.py \
    --deepspeed_config day06/ds_config_zero1.json
record "day07/results/train_$label.json" deepspeed --num_accelerators "$ranks" day07/train.py

compare() { # compare DAY NAME FLAGS...: run its compare.py, keep the table and the plots
    local day=$1 name=$2 folder="runs/results/$1_$2_$label"
    shift 2
    deepspeed --num_accelerators "$ranks" "$day/compare.py" "$@" --run_dir "$folder"
    cp "$folder/compare.json" "$day/results/${name}_$label.json"
    for plot in "$folder"/*.png; do cp "$plot" "$day/results/${name}_$(basename "$plot" .png)_$label.png"; done
}
compare day06 compare
compare day07 compare
compare day07 compare_mini --model mini --global_batch 4 --steps 12 --cases ddp fsdp2 zero0 zero1 zero2 zero3 zero3_tight
compare day07 compare_bf16 --bf16 --cases ddp fsdp2 zero1 zero2 zero3
