#!/usr/bin/env bash
# Measure the notes' figures on this machine: measure.sh LABEL RANKS [DAY...], `python` and `deepspeed` on the PATH.
# `make results` calls it; the files it writes are named after LABEL (2cpu, h100, 2xh200). No DAY means all of them.
set -eu
label=$1 ranks=$2
shift 2
gpu=$(nvidia-smi >/dev/null 2>&1 && echo yes || true)
record() { python -m tests.record "$@"; }
launch() { deepspeed --num_accelerators "$ranks" "$@"; }

keep() { # keep FOLDER DAY NAME TABLE: a run's TABLE.json and its plots become DAY/results/NAME_LABEL.json and .png
    cp "$1/$4.json" "$2/results/$3_$label.json"
    for plot in "$1"/*.png; do cp "$plot" "$2/results/$3_$(basename "$plot" .png)_$label.png"; done
}

compare() { # compare DAY NAME FLAGS...: run its compare.py, keep the table and the plots
    local day=$1 name=$2 folder="runs/results/$1_$2_$label"
    shift 2
    launch "$day/compare.py" "$@" --run_dir "$folder"
    keep "$folder" "$day" "$name" compare
}

day01() {
    record "day01/results/check_env_$label.json" python day01/labs/check_env.py
    record "day01/results/train_$label.json" python day01/train.py
    record "day01/results/hello_$label.json" deepspeed --num_accelerators "$ranks" day01/labs/hello_distributed.py
}

day02() {
    record "day02/results/train_$label.json" deepspeed --num_accelerators "$ranks" day02/train.py
}

day03() {
    record "day03/results/train_$label.json" deepspeed --num_accelerators "$ranks" day03/train.py \
        --deepspeed_config day03/ds_config_cosine.json
    local compare=(python day03/labs/compare.py --ranks "$ranks" --run_dir "runs/results/day03_$label")
    if [ "$gpu" ]; then # precision is a GPU's subject, and takes a model that keeps it busy
        compare+=(--model gpt2 --steps 100 --configs)
        for name in "" _fused_adam _bf16 _fp16 _autocast; do compare+=("day03/ds_config$name.json"); done
    fi
    "${compare[@]}"
    cp "runs/results/day03_$label/compare.json" "day03/results/compare_$label.json"
    for plot in loss speed; do cp "runs/results/day03_$label/$plot.png" "day03/results/${plot}_$label.png"; done
}

day04() {
    record "day04/results/train_$label.json" deepspeed --num_accelerators "$ranks" day04/train.py \
        --steps 100 --set zero_optimization.stage=2 gradient_accumulation_steps=2
    printf '{"train_micro_batch_size_per_gpu": 8, "gradient_cliping": 0.5, "stage": 2}\n' >my.json
    record --fails "day04/results/check_$label.json" python config/check.py my.json
    rm my.json
    python day04/labs/tune.py --ranks "$ranks" --run_dir "runs/results/day04_$label"
    cp "runs/results/day04_$label/tune.json" "day04/results/tune_$label.json"
    cp "runs/results/day04_$label/speed.png" "day04/results/tune_$label.png"
}

day05() {
    record "day05/results/train_$label.json" deepspeed --num_accelerators "$ranks" day05/train.py
    record "day05/results/train_bf16_$label.json" deepspeed --num_accelerators "$ranks" day05/train.py \
        --deepspeed_config day05/ds_config_bf16.json
}

day06() {
    record "day06/results/train_$label.json" deepspeed --num_accelerators "$ranks" day06/train.py
    record "day06/results/train_zero1_$label.json" deepspeed --num_accelerators "$ranks" day06/train.py \
        --deepspeed_config day06/ds_config_zero1.json
    compare day06 compare
}

day07() {
    record "day07/results/train_$label.json" deepspeed --num_accelerators "$ranks" day07/train.py
    compare day07 compare
    compare day07 compare_mini --model mini --global_batch 4 --steps 12 \
        --cases ddp fsdp2 zero0 zero1 zero2 zero3 zero3_tight
    compare day07 compare_bf16 --bf16 --cases ddp fsdp2 zero1 zero2 zero3
    [ "$gpu" ] || return 0 # models that fill GPUs, and the ladder of speed
    local large=(--bf16 --recompute --buckets 100000000)
    compare day07 compare_xl --model gpt2-xl --global_batch $((8 * ranks)) "${large[@]}" --steps 8
    compare day07 offload --model gpt2-xl --global_batch $((8 * ranks)) "${large[@]}" --steps 9 --cpu_adam \
        --cases zero2 zero2_offload zero3_leaf offload offload_optimizer
    compare day07 compare_8b --model gpt-8b --global_batch $((2 * ranks)) "${large[@]}" --steps 7 \
        --cases zero3_leaf zero2 zero1 ddp fsdp2
    launch day07/labs/speed.py --model gpt2-xl --cases fsdp2 zero2 leaf tuned --micro_batch 8 24 --steps 9 --window 3 \
        --run_dir "runs/results/day07_speed_$label"
    cp "runs/results/day07_speed_$label/speed.json" "day07/results/speed_$label.json"
    cp "runs/results/day07_speed_$label/speed.png" "day07/results/speed_$label.png"
}

day10() {
    record "day10/results/train_$label.json" deepspeed --num_accelerators "$ranks" day10/train.py
    record "day10/results/timeline_$label.json" deepspeed --num_accelerators "$ranks" day10/labs/timeline.py
    compare day10 compare
    compare day10 compare_sgd --deepspeed_config day10/ds_config_sgd.json --stages 0 1 2 3
    rm -f day10/results/compare_sgd_*_"$label.png" # the notes draw the first table alone
    launch day10/labs/scaling.py --run_dir "runs/results/day10_scaling_$label"
    keep "runs/results/day10_scaling_$label" day10 scaling scaling
    [ "$gpu" ] || return 0
    compare day10 compare --model gpt2 --global_batch 64 --accumulations 1 2 4 8 16 --bf16
}

day11() {
    record "day11/results/train_$label.json" deepspeed --num_accelerators "$ranks" day11/train.py
    for lab in look overflow underflow missing_bits; do
        record "day11/results/${lab}_$label.json" deepspeed --num_accelerators "$ranks" "day11/$lab.py"
    done
    compare day11 compare --steps 60
    compare day11 compare_traps --steps 20 --cases fp32 bf16_zero0 fp16_zero0 autocast_fp16_zero1
    [ "$gpu" ] || return 0
    compare day11 compare --model gpt2 --global_batch 8
    record "day11/results/overflow_$label.json" deepspeed --num_accelerators "$ranks" day11/labs/overflow.py --model gpt2
}

day12() {
    record "day12/results/train_$label.json" deepspeed --num_accelerators "$ranks" day12/train.py
    record "day12/results/resources_$label.json" \
        python day12/labs/resources.py "$(ls -d runs/day12/2* | tail -1)" --measure
    local folder="runs/results/day12_memory_$label"
    launch day12/labs/memory.py --run_dir "$folder"
    cp "$folder/memory.json" "day12/results/memory_$label.json"
    cp "$folder/memory.png" "day12/results/memory_$label.png"
    launch day12/labs/memory.py --recompute --loss_chunks 8 --run_dir "${folder}_cured"
    cp "${folder}_cured/memory.json" "day12/results/memory_cured_$label.json"
    cp "${folder}_cured/memory.png" "day12/results/memory_cured_$label.png"
    python day12/labs/oom.py --ranks "$ranks" --run_dir "runs/results/day12_oom_$label"
    keep "runs/results/day12_oom_$label" day12 oom oom
    [ "$gpu" ] || return 0
    record "day12/results/gpt2_$label.json" deepspeed --num_accelerators "$ranks" day12/train.py \
        --model gpt2 --deepspeed_config day12/ds_config_gpt2.json --steps 600 --save_every 100000
    python day12/labs/oom.py --ranks "$ranks" --model gpt2-medium --micro_batch 8 --steps 6 \
        --run_dir "runs/results/day12_oom_$label"
    keep "runs/results/day12_oom_$label" day12 oom oom
    folder="runs/results/day12_speed_$label"
    deepspeed --num_accelerators 1 day12/labs/speed.py --model gpt2 --batch_size 32 --steps 40 --window 10 --turns 21 \
        --profile hf lean no_average torch --run_dir "$folder"
    cp "$folder/speed.json" "day12/results/speed_$label.json"
    cp "$folder/speed.png" "day12/results/speed_$label.png"
}

day15() {
    record "day15/results/train_$label.json" deepspeed --num_accelerators "$ranks" day15/train.py
    record "day15/results/schedule_$label.json" python day15/schedule.py
    cp "$(ls -td runs/day15/*/schedule.png | head -1)" "day15/results/schedule_$label.png"
    record "day15/results/instructions_$label.json" \
        python day15/schedule.py --stages 2 --micro_batches 4 --schedules 1f1b --instructions
    record "day15/results/send_$label.json" python day15/schedule.py --schedules 1f1b --send 0.25
    record "day15/results/volume_$label.json" python day15/labs/volume.py
    record "day15/results/break_it_$label.json" deepspeed --num_accelerators "$ranks" day15/labs/break_it.py
    local folder="runs/results/day15_$label" stages=4 # its layers sleep: four CPU ranks do on two cores
    [ -z "$gpu" ] || stages=$ranks
    deepspeed --num_accelerators "$stages" day15/labs/bubble.py --run_dir "$folder"
    cp "$folder/bubble.json" "day15/results/bubble_$label.json"
}

day16() {
    rm -rf runs/day16/mine
    record "day16/results/train_$label.json" deepspeed --num_accelerators "$ranks" day16/train.py
    record "day16/results/train_balanced_$label.json" deepspeed --num_accelerators "$ranks" day16/train.py \
        --partition_method balanced --run_dir runs/day16/mine --save
    record "day16/results/convert_$label.json" python day16/convert.py runs/day16/mine/pipeline runs/day16/mine/model
    record "day16/results/last_batch_$label.json" deepspeed --num_accelerators "$ranks" day16/labs/last_batch.py
    local folder="runs/results/day16_$label"
    launch day16/labs/verify.py --run_dir "${folder}_verify"
    cp "${folder}_verify/verify.json" "day16/results/verify_$label.json"
    if [ -z "$gpu" ]; then # pipeline x data parallel
        deepspeed --num_accelerators 4 day16/labs/verify.py --stages 2 --run_dir "${folder}_2x2"
        cp "${folder}_2x2/verify.json" "day16/results/verify_2x2_$label.json"
    fi
    launch day16/labs/balance.py --run_dir "${folder}_balance"
    keep "${folder}_balance" day16 balance balance
    if [ "$gpu" ]; then # on the first GPU alone
        python day16/labs/stages.py --model gpt2-xl --bf16 --stages 4 --micro_batch 4 --run_dir "${folder}_stages"
        cp "${folder}_stages/stages.json" "day16/results/stages_$label.json"
    fi
    compare day16 compare
}

day17() {
    rm -rf runs/day17/mine
    record "day17/results/train_$label.json" \
        deepspeed --num_accelerators "$ranks" day17/train.py --run_dir runs/day17/mine
    launch day17/labs/compare.py --run_dir "runs/results/day17_$label"
    cp "runs/results/day17_$label/compare.json" "day17/results/compare_$label.json"
}

day18() {
    rm -rf runs/day18/mine runs/day18/drill
    for part in "first 30" "train 60"; do # a run of 30 steps, and the same one continued to 60
        read -r name steps <<<"$part"
        record "day18/results/${name}_$label.json" deepspeed --num_accelerators "$ranks" day18/train.py \
            --run_dir runs/day18/mine --steps "$steps"
    done
    record "day18/results/convert_$label.json" python day18/convert.py runs/day18/mine/checkpoints
    record "day18/results/one_rank_1${label#"$ranks"}.json" deepspeed --num_accelerators 1 day18/train.py \
        --run_dir runs/day18/mine --steps 80
    record "day18/results/export_$label.json" python day18/export.py runs/day18/mine/checkpoints runs/day18/mine/model
    record "day18/results/supervise_$label.json" python day18/supervise.py --drill kill \
        "deepspeed --num_accelerators $ranks day18/train.py --run_dir runs/day18/drill --steps 30"
}

day22() {
    record "day22/results/train_$label.json" deepspeed --num_accelerators "$ranks" day22/train.py
    record "day22/results/train_hf_$label.json" deepspeed --num_accelerators "$ranks" day22/train_hf.py
    record "day22/results/train_freeze_$label.json" deepspeed --num_accelerators "$ranks" day22/train.py \
        --new_tokens 0 --freeze 15
    record "day22/results/look_$label.json" python day22/labs/look.py
    local folder="runs/results/day22_$label"
    launch day22/labs/host_memory.py --run_dir "$folder"
    cp "$folder/host_memory.json" "day22/results/host_memory_$label.json"
    launch day22/labs/host_memory.py --pretrained llama-300m --run_dir "${folder}_300m"
    cp "${folder}_300m/host_memory.json" "day22/results/host_memory_300m_$label.json"
    python day22/labs/fits.py --run_dir "$folder"
    cp "$folder/fits.json" "day22/results/fits_$label.json"
}

day23() {
    rm -rf runs/day23/mine runs/day23/whale
    local mine=runs/day23/mine whale=runs/day23/whale folder="runs/results/day23_$label"
    record "day23/results/train_$label.json" deepspeed --num_accelerators "$ranks" day23/train.py --run_dir $mine
    record "day23/results/merge_$label.json" python day23/merge.py $mine/adapter $mine/merged
    record "day23/results/merge_bf16_$label.json" \
        python day23/merge.py $mine/adapter $mine/merged_bf16 --dtype bfloat16
    record "day23/results/whale_$label.json" deepspeed --num_accelerators "$ranks" day23/train.py \
        --deepspeed_config day23/ds_config_zero3.json --dataset moby_dick --steps 8 --run_dir $whale
    record "day23/results/generate_$label.json" \
        python day23/generate.py chat=$mine/adapter whale=$whale/adapter
    launch day23/labs/frozen.py --run_dir "$folder"
    cp "$folder/frozen.json" "day23/results/frozen_$label.json"
    compare day23 compare
    local speed=(--turns 6 --window 2)
    [ -z "$gpu" ] || speed=(--bf16 --batch_size 32 --turns 20)
    deepspeed --num_accelerators 1 day23/labs/speed.py "${speed[@]}" --run_dir "$folder"
    cp "$folder/speed.json" "day23/results/speed_1${label#"$ranks"}.json"
}

day25() {
    rm -rf runs/capstone/tiny
    record "day25/results/config_$label.json" python -m capstone.config capstone/configs/tiny.yaml
    for name in train again; do # from nothing, and with everything done
        record "day25/results/${name}_$label.json" deepspeed --num_accelerators "$ranks" day25/train.py
    done
    rm -f "day25/results/again_$label.png"
    local folder="runs/results/day25_$label"
    record "day25/results/budget_$label.json" \
        python day25/labs/budget.py --config capstone/configs/gpt2.yaml --run_dir runs/results/day25_budget
    cp runs/results/day25_budget/budget.json day25/results/budget_gpt2.json
    python day25/labs/stream.py --run_dir "$folder"
    cp "$folder/stream.json" "day25/results/stream_$label.json"
    rm -rf "$folder"/data_*
}

day26() {
    rm -rf runs/day26/mine runs/day26/one
    record "day26/results/first_$label.json" deepspeed --num_accelerators "$ranks" day26/train.py \
        --run_dir runs/day26/mine --stop_at 250
    cp -r runs/day26/mine runs/day26/one
    for name in train again; do
        record "day26/results/${name}_$label.json" deepspeed --num_accelerators "$ranks" day26/train.py \
            --run_dir runs/day26/mine
    done
    record "day26/results/one_rank_1${label#"$ranks"}.json" deepspeed --num_accelerators 1 day26/train.py \
        --run_dir runs/day26/one
    rm -f "day26/results/first_$label.png" "day26/results/again_$label.png" "day26/results/one_rank_1${label#"$ranks"}.png"
    python day26/labs/kill_test.py --run_dir "runs/results/day26_$label"
    cp "runs/results/day26_$label/kill_test.json" "day26/results/kill_test_$label.json"
    python day26/labs/speed.py --ranks "$ranks" --turns 8 --run_dir "runs/results/day26_speed_$label"
    cp "runs/results/day26_speed_$label/speed.json" "day26/results/speed_$label.json"
}

day27() {
    rm -rf runs/day27/mine runs/day27/tuned runs/day27/systems runs/day27/numbers runs/day27/healthy
    record "day27/results/train_$label.json" \
        deepspeed --num_accelerators "$ranks" day27/train.py --run_dir runs/day27/mine
    rm -f "day27/results/train_$label.png"
    watched() { # watched NAME FLAGS...
        local name=$1
        shift
        record "day27/results/${name}_$label.json" \
            python day27/labs/watch.py --run_dir "runs/day27/$name" "$@" --ranks "$ranks"
        cp "runs/day27/$name/watch.json" "day27/results/watch_${name}_$label.json"
    }
    watched systems --fault no_checkpoint@0 memory@8 slow@20-33 stall@38-51 kill@66
    watched numbers --fault overflow@10-24 diverge@26-40 nan@42
    watched healthy --seconds 600
    record "day27/results/tune_$label.json" python -m capstone.tune --config capstone/configs/tiny.yaml \
        run_dir=runs/day27/tuned train.global_batch=64 --micro_batch 8 16 32 --stage 1 2 3 --offload none \
        --bucket 500000 --limit_gib 0.2 --steps 4 --turns 3 --recompute no yes --exhaustive
    cp runs/day27/tuned/tune/tune.json "day27/results/tuned_$label.json"
}

day28() {
    rm -rf runs/day28/mine
    for name in train again; do
        record "day28/results/${name}_$label.json" deepspeed --num_accelerators "$ranks" day28/train.py \
            --run_dir runs/day28/mine
    done
    rm -f "day28/results/train_$label.png" "day28/results/again_$label.png"
    local folder="runs/results/day28_$label"
    python day28/labs/load.py runs/day28/mine/export --run_dir "$folder"
    cp "$folder/load.json" "day28/results/load_$label.json"
    cp "$folder/load.png" "day28/results/load_$label.png"
    record "day28/results/cost_$label.json" python day28/labs/cost.py "day28/results/load_$label.json" --max_p99_s 2
    command -v chromium >/dev/null || return 0
    python day28/labs/screenshot.py runs/day28/mine/export --run_dir "$folder"
    cp "$folder/page.png" "day28/results/page_$label.png"
}

for day in ${*:-$(ls -d day??)}; do
    mkdir -p "$day/results"
    "$day"
done
