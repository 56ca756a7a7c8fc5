"""How a command is launched, and how it ends: a user's mistake is one line and exit status 1, not a traceback.

    def main(argv=None):
        config = recipes.load(Config, argv)
        with entry.launched("generation") as accelerator:
            ...

    if __name__ == "__main__":
        entry.run(main)

`PHYSALIGN_TRACEBACK=1` shows the traceback. An error that this project did not word itself is a fault in the code:
it keeps its traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).parent.parent
PACKAGES = ("losses", "recipes", "train", "eval", "data_pipeline")


def run(main: Callable[[], Any]) -> None:
    """Call `main`, and end the process with status 1 and one line where it raises what a user can mend."""
    try:
        main()
    except Exception as error:
        if os.environ.get("PHYSALIGN_TRACEBACK") or not is_worded(error):
            raise
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        sys.stdout.flush()
        print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells count an interrupt


@contextmanager
def launched(work: str) -> "Iterator[Accelerator]":
    """The accelerator of a command whose processes hold a whole model each; its process group is closed at the end.

    Raises ValueError for a launch with DeepSpeed. work: what the message calls the command.
    """
    from train.parallel import build_accelerator  # here: commands without a network start faster

    accelerator = build_accelerator()
    refuse_sharding(accelerator, work)
    yield accelerator
    accelerator.end_training()


def refuse_sharding(accelerator: "Accelerator", work: str) -> None:
    """ValueError for a launch with DeepSpeed, which would shard the network of `work`."""
    if accelerator.distributed_type.value == "DEEPSPEED":
        raise ValueError(f"{work} gives each GPU a whole model: launch it with launch/ddp.yaml, not with DeepSpeed")


def is_worded(error: Exception) -> bool:
    """Whether the message is for users: a ValueError that a `raise` of this project made, or an OSError, which names
    its file."""
    if isinstance(error, OSError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename)
    ours = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in PACKAGES
    return isinstance(error, ValueError) and ours and (last.line or "").startswith("raise")


def first_line(error: Exception) -> str:
    """The first line of another package's error, to be part of a message; its type's name where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
