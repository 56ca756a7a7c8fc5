"""How a command ends: a user's mistake is one line and exit status 1, not a traceback.

    if __name__ == "__main__":
        entry.run(main)

`PHYSALIGN_TRACEBACK=1` shows the traceback. An error that this project did not word itself is a fault in the code:
it keeps its traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def is_worded(error: Exception) -> bool:
    """Whether the message is for users: a ValueError that a `raise` of this project made, or an OSError, which names
    its file."""
    if isinstance(error, OSError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    file = Path(last.filename)
    ours = file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in PACKAGES
    return isinstance(error, ValueError) and ours and (last.line or "").startswith("raise")
