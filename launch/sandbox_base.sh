#!/usr/bin/env bash
# The sandbox's base model from scratch, as shipped in eval/sandbox/model: one GPU, six minutes on an H200.
# Run from the repository's root; the pipeline is written to <output>/model.
set -euo pipefail

OUTPUT=${1:-runs/sandbox_base}
TRAIN="accelerate launch --config_file launch/one_gpu.yaml train/sft.py recipe=sandbox_base output=$OUTPUT"

python -m eval.sandbox.vae --folder "$OUTPUT/vae" --steps 1658 --batch 64 --pool 6000 --seed 0 --device cuda
python -m eval.sandbox.pipeline --vae "$OUTPUT/vae" --folder "$OUTPUT/start" --seed 0
accelerate launch --config_file launch/one_gpu.yaml data_pipeline/build.py recipe=sandbox_base output="$OUTPUT"
$TRAIN optim.steps=2907 optim.schedule=constant
$TRAIN  # the last fifth of a cosine to 0
python -m eval.sandbox.pipeline --vae "$OUTPUT/vae" --transformer "$OUTPUT/train/transformer" --folder "$OUTPUT/model" --seed 0
python -m eval.run recipe=sandbox_base output="$OUTPUT" backbone.path="$OUTPUT/model" run.sandbox.clips=64 run.batch_size=64
