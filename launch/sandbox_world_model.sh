#!/usr/bin/env bash
# The sandbox's world model from scratch, as shipped in eval/sandbox/world_model: one GPU, two minutes on an H200.
# Run from the repository's root; the model is written to <output>, then its knowledge of physics is measured.
set -euo pipefail

OUTPUT=${1:-runs/sandbox_world_model}

python -m eval.experiments.world_model.training --output "$OUTPUT" --steps 12000 --batch 64 --pool 10000 --learning-rate 1.5e-3 --seed 0
python -m eval.experiments.world_model.report --model "$OUTPUT" --pairs 256
python -m eval.experiments.world_model.report --model "$OUTPUT" --pairs 256 --severity 0.5
