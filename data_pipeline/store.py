"""Tensors that are costly to make, kept by the digest of all that they depend on: nothing is made twice.

    <folder>/ab/abcd....safetensors     of one clip; the metadata holds a checksum of all that is in the file, and names
                                        the clips that were made in one batch with it. Files of earlier versions have
                                        no checksum, and are taken as they are
    <folder>/lost/abcd...               empty: that file was missing or damaged when it was needed, and is made anew

A network's result depends, in its last bits, on the clips beside it in the batch. So a batch is fixed by its unit, and
counts as made only as a whole: a run that was killed and continued gives the bytes of one that was not.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.tables import Advance, Bad, TableRow
from train import files
from train.clips import ClipError


class Store:
    """settings: plain values that the tensors depend on, beside their row."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, settings

    def digest(self, row: TableRow) -> str:
        """Of all that tensors made from a row depend on: what it says, what its file holds (`identity`, a column from
        the generate stage on), and the settings."""
        return files.digest([self.settings, *(row[name] for name in ("key", "prompt", "start", "identity"))])

    def make_missing(
        self,
        rows: Sequence[TableRow],
        read: Callable[[TableRow], Any],
        make: Callable[[list[TableRow], list[Any]], Iterable[Mapping[str, Tensor]]],
        *,
        together: int,
        advance: Advance,
    ) -> Bad:
        """Make the tensors of rows that are not there, in batches of `together` rows, which are the same in every run.

        read: what is needed of a row's clip, before any is made; rows for which it raises ClipError are left out, and
        come back with reason and detail. make: the tensors of some rows, given what was read of them.
        """
        bad: Bad = {}
        for first in range(0, len(rows), together):
            places = {self.digest(rows[place]): place for place in range(first, min(first + together, len(rows)))}
            found: dict[str, Any] = {}
            for name in self.missing(list(places)):
                try:
                    found[name] = read(rows[places[name]])
                except ClipError as error:
                    bad[places[name]] = (error.reason, str(error))
            if found:
                made = make([rows[places[name]] for name in found], list(found.values()))
                self.save(dict(zip(found, made, strict=True)))
            advance(len(places))
        return bad

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
            with files.atomic(self.path(digest)) as temporary:
                save_file(whole, temporary, {"checksum and batch": entry})
            self._lost(digest).unlink(missing_ok=True)

    def load(self, digest: str) -> dict[str, Tensor]:
        """Raises ValueError where the file is missing or damaged; it is then made anew when the build runs again."""
        found = self._read(digest)
        if found is None:
            files.write_text(self._lost(digest), "")
            raise ValueError(
                f"{self.path(digest)} is missing or damaged: run the whole build again, which makes it anew"
            )
        return found[0]

    def load_of(self, row: TableRow) -> dict[str, Tensor]:
        """`load` of a row of the generate stage or a later one."""
        return self.load(self.digest(row))

    def lost(self) -> set[str]:
        """The digests of which `load` found nothing, and that were not made since."""
        return {path.name for path in (self.folder / "lost").glob("*")}

    def unused(self, wanted: Collection[str]) -> int:
        """Bytes of what is kept for none of the `wanted` digests."""
        kept = self.folder.glob("??/*.safetensors")
        return sum(path.stat().st_size for path in kept if path.stem not in wanted)

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
