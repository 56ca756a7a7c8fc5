"""What the tests run in processes of their own."""

import multiprocessing
from importlib import import_module


def train(entry: str, arguments: list[str]) -> None:
    """Train as `python -m <entry> <arguments>` does, in a process that a fork server made: its loader processes fork again."""
    multiprocessing.set_start_method("fork", force=True)
    import_module(entry).main(arguments)
