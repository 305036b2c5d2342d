"""Sources: where pictures come from. Files, encoded bytes, pixels in memory, some rows of another source."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from lynceus.data.decode import UnreadableError, image_size, read_image


@runtime_checkable
class Source(Protocol):
    """Where pictures come from. Rows are 0 .. len - 1; `read` raises UnreadableError, the others never decode."""

    @property
    def rich(self) -> bool: ...  # whether `target` ever gives anything

    def __len__(self) -> int: ...
    def read(self, row: int) -> UInt8[Tensor, "3 h w"]: ...
    def raw(self, row: int) -> bytes: ...  # the bytes as stored, for hashes
    def id(self, row: int) -> str: ...
    def path(self, row: int) -> str | None: ...
    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        """What else a Sample holds. size: (h, w) when known. maps: with masks and segments."""
        ...

    def stamp(self, row: int) -> str: ...  # a cheap mark of the content, the same on every machine


@runtime_checkable
class Targets(Protocol):
    """What is known about the rows of a source besides labels, e.g. `lynceus.data.boxes.Annotations`."""

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]: ...


class Files:
    """Picture files under one root. names: paths relative to it, with slashes. targets: what else is known by row."""

    def __init__(
        self,
        root: str | Path,
        names: Sequence[str],
        *,
        sizes: Sequence[int] | None = None,
        targets: Targets | None = None,
    ):
        self.root, self.names, self.sizes, self.targets = str(root), names, sizes, targets

    @property
    def rich(self) -> bool:
        return self.targets is not None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> Tensor:
        return read_image(self.path(row))

    def raw(self, row: int) -> bytes:
        return Path(self.path(row)).read_bytes()

    def size(self, row: int) -> tuple[int, int]:
        """(h, w) from the header."""
        return image_size(self.path(row))

    def id(self, row: int) -> str:
        return self.names[row]

    def path(self, row: int) -> str:
        name = self.names[row]
        return name if name.startswith("/") else f"{self.root}/{name}"

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        return self.targets.target(row, size=size, maps=maps) if self.targets is not None else {}

    def stamp(self, row: int) -> str:
        size = self.sizes[row] if self.sizes is not None else Path(self.path(row)).stat().st_size
        return f"{self.names[row]}:{size}"


class Blobs:
    """Encoded pictures in memory or in an arrow column: anything indexable that gives bytes."""

    def __init__(self, blobs: Any, ids: Sequence[str], *, where: str, targets: Targets | None = None):
        self.blobs, self.ids, self.where, self.targets = blobs, ids, where, targets

    @property
    def rich(self) -> bool:
        return self.targets is not None

    def __len__(self) -> int:
        return len(self.ids)

    def raw(self, row: int) -> bytes:
        value = self.blobs[row]
        value = value.as_py() if hasattr(value, "as_py") else value
        if value is None:
            raise UnreadableError(f"{self.where}, row {row}", "there is neither a picture nor a path in it")
        return bytes(value)

    def read(self, row: int) -> Tensor:
        return read_image(self.raw(row), name=f"{self.where}, {self.ids[row]}")

    def id(self, row: int) -> str:
        return self.ids[row]

    def path(self, row: int) -> str | None:
        return None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        return self.targets.target(row, size=size, maps=maps) if self.targets is not None else {}

    def stamp(self, row: int) -> str:
        return hashlib.blake2b(self.raw(row), digest_size=8).hexdigest()


class Pixels:
    """Pictures that are one uint8 tensor (n, 3, h, w) already."""

    def __init__(self, images: Tensor, *, ids: Sequence[str] | None = None, targets: Targets | None = None):
        self.images, self.ids, self.targets = images, ids, targets

    @property
    def rich(self) -> bool:
        return self.targets is not None

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def read(self, row: int) -> Tensor:
        return self.images[row]

    def raw(self, row: int) -> bytes:
        return self.images[row].numpy().tobytes()

    def id(self, row: int) -> str:
        return self.ids[row] if self.ids is not None else str(row)

    def path(self, row: int) -> str | None:
        return None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        return self.targets.target(row, size=size, maps=maps) if self.targets is not None else {}

    def stamp(self, row: int) -> str:
        return hashlib.blake2b(self.raw(row), digest_size=8).hexdigest()


class Chosen:
    """Some rows of another source, with other targets when given."""

    def __init__(self, source: Source, rows: np.ndarray, *, targets: Targets | None = None):
        self.source, self.rows, self.targets = source, rows, targets

    @property
    def rich(self) -> bool:
        return self.targets is not None or self.source.rich

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Tensor:
        return self.source.read(int(self.rows[row]))

    def raw(self, row: int) -> bytes:
        return self.source.raw(int(self.rows[row]))

    def id(self, row: int) -> str:
        return self.source.id(int(self.rows[row]))

    def path(self, row: int) -> str | None:
        return self.source.path(int(self.rows[row]))

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        if self.targets is not None:
            return self.targets.target(row, size=size, maps=maps)
        return self.source.target(int(self.rows[row]), size=size, maps=maps)

    def stamp(self, row: int) -> str:
        return self.source.stamp(int(self.rows[row]))
