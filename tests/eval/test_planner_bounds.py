"""The inverse dynamics model learns which way a square went; the table of bounds."""

import numpy as np
import torch

from eval.experiments.planner import bounds
from eval.robots.inverse_dynamics import Settings, train


def test_the_inverse_dynamics_model_learns_a_motion():
    generator = torch.Generator().manual_seed(0)
    frames = torch.full((24, 5, 32, 32, 3), 128, dtype=torch.uint8)
    steps = torch.randint(-2, 3, (24, 4), generator=generator)  # pixels to the right, from frame to frame
    for clip in range(24):
        for frame, x in enumerate([12, *(12 + steps[clip].cumsum(0)).tolist()]):
            frames[clip, frame, 12:18, x : x + 6] = 0
    actions = torch.zeros(24, 8, 4)
    actions[..., 0] = (steps / 2).repeat_interleave(2, dim=1)
    model = train(frames, actions, Settings(steps=120, batch=32), seed=0)
    decoded = np.stack([model.decode(clip.numpy()) for clip in frames])  # (24, 4, 4)
    error = np.abs(decoded - actions[:, ::2].numpy()).mean(axis=(0, 1))
    assert error[0] < 0.2 and error[1:].max() < 0.1


def test_the_table_has_wilson_intervals_and_names_what_failed():
    rows = [
        {"task": "push", "index": index, "planner": "expert", "success": index < 8, "error": ""} for index in range(10)
    ]
    rows.append({"task": "push", "index": 10, "planner": "expert", "success": None, "error": "it hung"})
    text = bounds.table(rows, ["push"])
    assert "0.800 [0.490, 0.943]" in text and "failed: push 10 expert: it hung" in text
