"""Frozen models that say what a clip shows, for the physics losses: one small file each.

    track = TRACKERS["lucas_kanade"].build(config, device)      track(frames, queries) -> tracks (T,N,2), visible (T,N)
    disparity = DEPTHS["depth_anything"].build(config, device)  disparity(frame) -> (H,W) in [0, 1], near is large
    encode = ENCODERS["vjepa2"].build(config, device)           encode(frames) -> VideoTokens; .shape(config) -> theirs

A new one is a file with a config dataclass, `check(config)`, `build(config, device)`, and a line here. `check` opens no
weights: what a user can fix is said before any work.
"""

from train.teachers import cotracker3, depth_anything, lucas_kanade, vjepa2

TRACKERS = {"lucas_kanade": lucas_kanade, "cotracker": cotracker3}
DEPTHS = {"depth_anything": depth_anything}
ENCODERS = {"vjepa2": vjepa2}
