#!/usr/bin/env bash
# The sandbox's base model from scratch, as shipped in eval/sandbox/model: one GPU, eight minutes on an H200.
# Run from the repository's root; the pipeline is written to <output>/model.
set -euo pipefail

OUTPUT=${1:-runs/sandbox_base}
LAUNCH="accelerate launch --config_file launch/one_gpu.yaml"

python -m eval.sandbox.vae --folder "$OUTPUT/vae" --steps 1600 --batch 64 --pool 6000 --seed 0
python -m eval.sandbox.pipeline --vae "$OUTPUT/vae" --folder "$OUTPUT/start" --seed 0
$LAUNCH data_pipeline/build.py recipe=sandbox_base output="$OUTPUT"
$LAUNCH train/sft.py recipe=sandbox_base output="$OUTPUT"
python -m eval.sandbox.pipeline --vae "$OUTPUT/vae" --transformer "$OUTPUT/train/transformer" --folder "$OUTPUT/model" --seed 0
$LAUNCH eval/run.py recipe=sandbox output="$OUTPUT" backbone.path="$OUTPUT/model" run.sandbox.clips=512 run.batch_size=128
