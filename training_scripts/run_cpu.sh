#!/usr/bin/env bash
# Everything from nothing, in minutes on two cores: an untrained nano checkpoint, spoken and drawn data, T2A, A2A projector,
# A2A, I2T projector, I2T, and an answer to a written, a spoken and a pictured question.
#   training_scripts/run_cpu.sh WORKDIR
# It needs the package with its `train` extra, and espeak-ng or another command-line TTS. A run that was interrupted goes on when
# it is started again. In the environment:
#   TTS    the command that speaks {text} into the WAV file {out} (default: espeak-ng -w {out} -- {text})
#   EXTRA  more options for every stage, such as "--max_steps 2"
# This shows that the parts fit together, and what a training looks like. It makes no useful model: nano's codec and encoders are
# random, so its speech is noise even where every code is right, and it has seen sixteen things and eighteen kinds of picture.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
work=${1:?usage: run_cpu.sh WORKDIR}
# On a model this small more threads only get in each other's way, most of all where others use the cores too.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
tts=${TTS:-espeak-ng -w {out\} -- {text\}}
sources="$work/sources" data="$work/data" runs="$work/runs" nano="$work/nano"
mkdir -p "$work" "$data" "$runs"

# Each of these appears complete under its name, or not at all.
[ -d "$sources" ] || python "$here/cpu/make_cpu_data.py" "$sources" --tts "$tts"
[ -d "$nano" ] || minimind-o init nano "$nano"
build() {
    [ -f "$data/$1.parquet" ] || minimind-o data build "$sources/$1.${2:-jsonl}" "$data/$1.parquet" --model "$nano" "${@:3}"
}
for split in train eval; do
    build t2a_$split txt --tts "$tts" --voice alba --text-questions
    build a2a_$split jsonl --tts "$tts" --voice alba
    build i2t_$split jsonl
done
minimind-o data check "$data"/*.parquet --model "$nano"

model="$nano"
# Stages and their data: what comes first is evaluated on, what follows keeps the model from forgetting it.
for stage in 1_t2a:t2a 2_a2a_projector:a2a 3_a2a:a2a,t2a 4_i2t_projector:i2t 5_i2t:i2t,a2a,t2a; do
    name=${stage%%:*} kinds=${stage#*:}
    if [ ! -f "$runs/$name.done" ]; then
        files=()
        for kind in ${kinds//,/ }; do files+=("$data/${kind}_train.parquet"); done
        # shellcheck disable=SC2086  # EXTRA is several words.
        python "$here/train_sft.py" "$here/recipes/cpu/$name.yaml" --model "$model" --output_dir "$runs/$name" \
            --train_files "${files[@]}" --eval_files "$data/${kinds%%,*}_eval.parquet" ${EXTRA:-}
        touch "$runs/$name.done"
    fi
    model="$runs/$name"
done
python "$here/cpu/show_figures.py" "$runs"/*/

ask() { minimind-o chat --model "$model" --voice alba --seed 0 --max-new-tokens 40 "$@"; }
ask --text "What colour is the sky?" --out "$work/reply.wav"
ask --audio "$sources/recordings/eval_0.wav" --out "$work/reply_to_speech.wav"
ask --image "$sources/pictures/eval_red_circle_6.png" --text "What is this?" --out "$work/reply_to_picture.wav"
