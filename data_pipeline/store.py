"""Tensors that are costly to make, kept by the digest of all that they depend on: nothing is made twice.

    <folder>/ab/abcd....safetensors     of one clip; the metadata names the clips that were made in one batch with it

A network's result depends, in its last bits, on the clips beside it in the batch. So a batch is fixed by its unit, and
counts as made only as a whole: a run that was killed and continued gives the bytes of one that was not.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.tables import atomic


class Store:
    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def missing(self, batch: Sequence[str]) -> list[str]:
        """Those of a batch that are to be made, together and in this order, before all of it can be loaded.

        Where a run was killed between the files of a batch, those that it wrote are made again.
        """
        absent = {digest for digest in batch if not self.path(digest).exists()}
        if absent:
            absent |= {digest for digest in set(batch) - absent if not self._is_whole(digest, absent)}
        return [digest for digest in batch if digest in absent]

    def _is_whole(self, digest: str, absent: Collection[str]) -> bool:
        """Whether a file can be read and none of `absent` was made in its batch."""
        try:
            with safe_open(self.path(digest), "pt") as file:
                return not set(file.metadata()["batch"].split()) & set(absent)
        except SafetensorError:
            return False

    def save(self, made: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep what one batch gave, by digest."""
        for digest, tensors in made.items():
            with atomic(self.path(digest)) as temporary:
                whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(whole, temporary, {"batch": " ".join(made)})

    def load(self, digest: str) -> dict[str, Tensor]:
        """Raises ValueError where the file is missing or damaged."""
        try:
            return load_file(self.path(digest))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.path(digest)} is missing or damaged ({error}): delete it and build again"
            ) from error

    def unused(self, wanted: Collection[str]) -> int:
        """Bytes of what is kept for none of the `wanted` digests."""
        files = self.folder.glob("??/*.safetensors")
        return sum(path.stat().st_size for path in files if path.stem not in wanted)
