#!/usr/bin/env bash
# The full recipe, all seven stages, on four GPUs; CONFIG names another of accelerate's configurations than accelerate/ddp.yaml.
#   training_scripts/run_full.sh CHECKPOINT T2A.parquet A2A.parquet I2T.parquet RUNS
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
model=$1 t2a=$2 a2a=$3 i2t=$4 runs=$5
config=${CONFIG:-$here/accelerate/ddp.yaml}
for stage in 1_t2a:"$t2a" 2_a2a_projector:"$a2a" 3_a2a:"$a2a" 4_i2t_projector:"$i2t" 5_i2t:"$i2t" 6_a2a:"$a2a" 7_i2t_projector:"$i2t"; do
    name=${stage%%:*}
    accelerate launch --config_file "$config" "$here/train_sft.py" "$here/recipes/full/$name.yaml" --model "$model" --train_files "${stage#*:}" --output_dir "$runs/$name"
    model="$runs/$name"
done
