#!/usr/bin/env bash
# The whole chain in miniature, on any machine: simulated clips -> preference groups -> PhyGDPO -> comparison clips.
# Run from the repository's root. A second run continues where the first stopped; delete the output folder to start anew.
set -euo pipefail

OUTPUT=${1:-runs/tiny}
LAUNCH="accelerate launch --config_file launch/cpu.yaml"

python -m train.backbones.tiny --family wan21 --folder "$OUTPUT/model"
python -m eval.sandbox.write --folder "$OUTPUT/raw" --count 12
$LAUNCH data_pipeline/build.py recipe=tiny output="$OUTPUT" pipeline.manifest="$OUTPUT/raw/manifest.csv"
$LAUNCH train/gdpo.py recipe=tiny output="$OUTPUT"
$LAUNCH eval/generate.py recipe=tiny output="$OUTPUT" generate.lora="$OUTPUT/train"

echo
echo "LoRA             $OUTPUT/train/lora/pytorch_lora_weights.safetensors"
echo "metrics          $OUTPUT/train/metrics.jsonl"
echo "comparison clip  $(ls "$OUTPUT"/clips/side_by_side/*.mp4 | head -n 1)"
