"""Assembles the sandbox's pipeline, see `eval.small_wan.pipeline`.

    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder runs/sandbox/start --seed 0
    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder model --transformer runs/sandbox/trained/transformer

Less than 20 MB, of which the DiT of 7M parameters has 13.
"""

from eval.small_wan.pipeline import pipeline_command
from train import entry
from train.backbones.wan21 import Wan21

NETWORK = Wan21.architectures["sandbox"]["transformer"]


def main(argv: list[str] | None = None) -> None:
    pipeline_command(__doc__, NETWORK, argv)


if __name__ == "__main__":
    entry.run(main)
