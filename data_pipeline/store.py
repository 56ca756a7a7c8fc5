"""Tensors that are costly to make, kept by the digest of all that they depend on: nothing is made twice.

    <folder>/ab/abcd....safetensors     of one clip; the metadata holds a checksum of all that is in the file, and names
                                        the clips that were made in one batch with it. Files of earlier versions have
                                        no checksum, and are taken as they are
    <folder>/lost/abcd...               empty: that file was missing or damaged when it was needed, and is made anew

A network's result depends, in its last bits, on the clips beside it in the batch. So a batch is fixed by its unit, and
counts as made only as a whole: a run that was killed and continued gives the bytes of one that was not.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.files import atomic, write_text


class Store:
    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def missing(self, batch: Sequence[str]) -> list[str]:
        """Those of a batch that are to be made, together and in this order, before all of it can be loaded.

        Where a run was killed between the files of a batch, those that it wrote are made again.
        """
        found = {digest: self._read(digest) for digest in batch}
        absent = {digest for digest, file in found.items() if file is None}
        absent |= {digest for digest, file in found.items() if file is not None and absent & set(file[1])}
        return [digest for digest in batch if digest in absent]

    def save(self, made: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep what one batch gave, by digest."""
        for digest, tensors in made.items():
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            # One entry: safetensors writes several in any order, and equal tensors must be equal files.
            entry = " ".join([_checksum(digest, made, whole), *made])
            with atomic(self.path(digest)) as temporary:
                save_file(whole, temporary, {"checksum and batch": entry})
            self._lost(digest).unlink(missing_ok=True)

    def load(self, digest: str) -> dict[str, Tensor]:
        """Raises ValueError where the file is missing or damaged; it is then made anew when the build runs again."""
        found = self._read(digest)
        if found is None:
            write_text(self._lost(digest), "")
            raise ValueError(
                f"{self.path(digest)} is missing or damaged: run the whole build again, which makes it anew"
            )
        return found[0]

    def lost(self) -> set[str]:
        """The digests of which `load` found nothing, and that were not made since."""
        return {path.name for path in (self.folder / "lost").glob("*")}

    def unused(self, wanted: Collection[str]) -> int:
        """Bytes of what is kept for none of the `wanted` digests."""
        files = self.folder.glob("??/*.safetensors")
        return sum(path.stat().st_size for path in files if path.stem not in wanted)

    def _lost(self, digest: str) -> Path:
        return self.folder / "lost" / digest

    def _read(self, digest: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """The tensors and the digests of their batch; None where the file is missing or does not fit its checksum."""
        try:
            with safe_open(self.path(digest), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if metadata.keys() == {"batch"}:  # an earlier version wrote no checksum; making losers again takes GPU days
            return tensors, metadata["batch"].split()
        checksum, *batch = metadata.get("checksum and batch", "").split(" ")
        return (tensors, batch) if checksum == _checksum(digest, batch, tensors) else None


def _checksum(digest: str, batch: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a file's content, its own name included."""
    found = hashlib.sha256(f"{digest}\0{' '.join(batch)}\0".encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
