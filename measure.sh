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
