#!/usr/bin/env bash
# The whole chain in miniature, on any machine: simulated clips and the small shipped model -> preference groups ->
# PhyGDPO -> clips and their measured physics, base beside tuned. Run from the repository's root. A second run
# continues where the first stopped; delete the output folder to start anew.
set -euo pipefail

export OMP_WAIT_POLICY=PASSIVE  # waiting threads leave a busy machine's cores to others

OUTPUT=${1:-runs/sandbox}
LAUNCH="accelerate launch --quiet --config_file launch/cpu.yaml"

$LAUNCH data_pipeline/build.py recipe=sandbox output="$OUTPUT"
$LAUNCH train/gdpo.py recipe=sandbox output="$OUTPUT"
$LAUNCH eval/run.py recipe=sandbox output="$OUTPUT" run.lora="$OUTPUT/train"

echo
echo "LoRA             $OUTPUT/train/lora/pytorch_lora_weights.safetensors"
echo "metrics          $OUTPUT/train/metrics.jsonl"
echo "report           $OUTPUT/eval/report/report.html"
echo "comparison clip  $OUTPUT/eval/sandbox/comparison.mp4  (true | base | tuned)"
echo "frame by frame   $OUTPUT/eval/sandbox/sheet.png"
