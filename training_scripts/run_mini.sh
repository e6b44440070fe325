#!/usr/bin/env bash
# The mini recipe on one GPU: T2A, A2A projector, A2A.
#   training_scripts/run_mini.sh CHECKPOINT T2A.parquet A2A.parquet RUNS
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
model=$1 t2a=$2 a2a=$3 runs=$4
for stage in 1_t2a:"$t2a" 2_a2a_projector:"$a2a" 3_a2a:"$a2a"; do
    name=${stage%%:*}
    python "$here/train_sft.py" "$here/recipes/mini/$name.yaml" --model "$model" --train_files "${stage#*:}" --output_dir "$runs/$name"
    model="$runs/$name"
done
