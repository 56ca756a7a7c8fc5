"""Assembles the sandbox's pipeline, see `eval.small_wan.pipeline`.

    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder runs/sandbox/start --seed 0
    python -m eval.sandbox.pipeline --vae runs/sandbox/vae --folder model --transformer runs/sandbox/trained/transformer

Less than 20 MB, of which the DiT of 7M parameters has 13.
"""

import argparse

from eval.small_wan.pipeline import write_pipeline
from train import entry
from train.backbones.wan21 import Wan21

NETWORK = Wan21.architectures["sandbox"]["transformer"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", required=True, help="folder that eval.sandbox.vae wrote")
    parser.add_argument("--folder", required=True, help="of the pipeline that is written")
    parser.add_argument("--transformer", default=None, help="folder of a trained transformer (default: a fresh one)")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh transformer and of the text encoder")
    given = parser.parse_args(argv)
    more = {"seed": given.seed, "transformer_folder": given.transformer}
    folder = write_pipeline(given.vae, given.folder, NETWORK, **more)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"wrote {folder}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    entry.run(main)
