"""A world whose physics is known: simulated clips with exact tracks, masks and depth, and planted violations."""

from eval.sandbox.clips import SCENES, Clips, simulate
from eval.sandbox.world import VIOLATIONS

__all__ = ["SCENES", "VIOLATIONS", "Clips", "simulate"]
