"""One simulator process: a job per line of JSON in, a message out.

For `eval.robots.simulators` a job names a demonstration, the size of its clip, and the options of `demonstrate`; the
answer holds a Demonstration's arrays. For `eval.robots.episodes` it has a `command`, a method of Episode, and that
one's arguments; the answer is what the method returns.

A message is its length in 8 bytes and an .npz file of the answer's arrays, or of `error` alone.
"""

import io
import json
import os
import struct
import sys
from contextlib import ExitStack

import numpy as np

from eval.robots import render
from eval.robots.demonstrations import Listed, demonstrate
from eval.robots.world import World
from train import entry
from train.clips import VideoConfig


class Episode:
    """One episode, from `open` to the next."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def open(self, task: str, seed: int, colour: str, height: int, width: int) -> dict[str, np.ndarray]:
        """A world with initial positions of their own, seen at this size."""
        self._held.close()
        self.world = World(task, seed, colour)
        self.camera = self._held.enter_context(render.camera(self.world, height, width))
        return {}

    def frame(self) -> dict[str, np.ndarray]:
        """frames (1, H, W, 3) uint8: what the camera sees now."""
        return {"frames": self._draw()[None]}

    def future(self, count: int, skip: int) -> dict[str, np.ndarray]:
        """What the expert would do from here: frames (count + 1, H, W, 3) uint8, the first of now, one every `skip`
        control steps, and actions (count * skip, 4). Nothing of it happens."""
        frames, actions = [self._draw()], []
        with self.world.imagined():
            for _ in range(count):
                for _ in range(skip):
                    actions.append(self.world.expert())
                    self.world.step(actions[-1])
                frames.append(self._draw())
        return {"frames": np.stack(frames), "actions": np.stack(actions)}

    def act(self, actions: list[list[float]], every: int = 0) -> dict[str, np.ndarray]:
        """success () bool: whether the task was solved at any moment of these control steps, (n, 4); the rest is not
        executed then. every: also frames (m, H, W, 3) uint8, one after so many control steps and one of the last."""
        frames, success = [], False
        for number, action in enumerate(actions, start=1):
            success = self.world.step(np.array(action))[1]
            if every and (success or number % every == 0 or number == len(actions)):
                frames.append(self._draw())
            if success:
                break
        return {"success": np.array(success)} | ({"frames": np.stack(frames)} if frames else {})

    def _draw(self) -> np.ndarray:
        return self.camera.frame(*self.world.pose())


def main() -> None:
    # What libraries print must not get between the messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    episode = Episode()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if command := job.pop("command", ""):
                made = getattr(episode, command)(**job)
            else:
                made = vars(demonstrate(Listed(**job["listed"]), VideoConfig(**job["video"]), **job["options"]))
        except Exception as error:  # of the simulator or the renderer: the parent names the clip or the episode
            made = {"error": np.array(f"{type(error).__name__}: {error}")}
        message = io.BytesIO()
        np.savez(message, **made)
        replies.write(struct.pack("<Q", message.tell()) + message.getvalue())
        replies.flush()


if __name__ == "__main__":
    entry.run(main)
