"""One simulator process, for `eval.robots.simulators`: a job per line of JSON in, a message out.

A job names a demonstration, the size of its clip, and the options of `demonstrate`. A message is its length in 8 bytes
and an .npz file of a Demonstration's arrays, or of `error` alone.
"""

import io
import json
import os
import struct
import sys

import numpy as np

from eval.robots.demonstrations import Listed, demonstrate
from train import entry
from train.clips import VideoConfig


def main() -> None:
    # What libraries print must not get between the messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            made = vars(demonstrate(Listed(**job["listed"]), VideoConfig(**job["video"]), **job["options"]))
        except Exception as error:  # of the simulator or the renderer: the parent names the demonstration
            made = {"error": np.array(f"{type(error).__name__}: {error}")}
        message = io.BytesIO()
        np.savez(message, **made)
        replies.write(struct.pack("<Q", message.tell()) + message.getvalue())
        replies.flush()


if __name__ == "__main__":
    entry.run(main)
