"""Images that stay in a file and are read when they are asked for, so that a set may be larger than the memory of the host."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

# Images are read in pieces of about this many bytes, each by one of several threads. Shorter pieces would cost more than they save.
_PIECE_BYTES, _THREADS = 2**18, 16


class OnDisk:
    """Images [n, h, w, c], or rows of bytes [n, bytes], in a file that holds them one after the other.

    Indexing its first axis reads what is asked for and gives an array. `only` and `reshape` read nothing.

    Args:
        mapped: the images of the whole file, mapped by NumPy.
        numbers: those of the images in the file that are meant, in their order.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, mapped: UInt8[np.ndarray, "all *item"], numbers: Int[np.ndarray, " n"]):
        self._mapped, self._numbers = mapped, numbers

    @classmethod
    def joined(cls, parts: Sequence["OnDisk"]) -> "OnDisk":
        """The images of several parts of one file, one after the other."""
        return cls(parts[0]._mapped, np.concatenate([part._numbers for part in parts]))

    @property
    def shape(self) -> tuple[Any, ...]:
        return (len(self._numbers), *self._mapped.shape[1:])

    def __len__(self) -> int:
        return len(self._numbers)

    def only(self, numbers: Int[np.ndarray, " k"]) -> "OnDisk":
        """The images with these numbers, in this order, still in the file."""
        return OnDisk(self._mapped, self._numbers[numbers])

    def reshape(self, count: int, *item: int) -> "OnDisk":
        """The same images, each of another shape. `count` is their number, or -1; another -1 stands for what is left."""
        if count not in (-1, len(self)):
            raise ValueError(f"{len(self)} images are not {count}")
        return OnDisk(self._mapped.reshape(len(self._mapped), *item), self._numbers)

    def __getitem__(self, chosen: Any) -> UInt8[np.ndarray, "..."]:
        """Reads images. `chosen` is what indexes the first axis of an array: a number, a slice, or an array of numbers of any shape."""
        import grain  # takes a second, and few runs need it

        numbers = np.asarray(self._numbers[chosen])
        shape = self._mapped.shape[1:]
        images, done = np.empty((numbers.size, *shape), np.uint8), 0
        pieces = _Pieces(self._mapped, numbers.ravel(), max(1, _PIECE_BYTES // max(1, math.prod(shape))))
        threads = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
        for piece in grain.MapDataset.source(pieces).to_iter_dataset(threads) if len(pieces) else ():
            images[done : done + len(piece)] = piece
            done += len(piece)
        return images.reshape(*numbers.shape, *shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Reads all images."""
        return self[:].astype(dtype or self.dtype, copy=False)


Pixels = np.ndarray | OnDisk  # images of a set, in memory or on disk


class _Pieces:
    """The wanted images in pieces of `length`, as a source from which Grain reads by several threads."""

    def __init__(self, mapped: np.ndarray, numbers: np.ndarray, length: int):
        self._mapped, self._numbers, self._length = mapped, numbers, length

    def __len__(self) -> int:
        return -(-len(self._numbers) // self._length)

    def __getitem__(self, number: int) -> UInt8[np.ndarray, "images *item"]:
        wanted = self._numbers[number * self._length : (number + 1) * self._length]
        piece = np.empty((len(wanted), *self._mapped.shape[1:]), np.uint8)
        for out, image in zip(piece, wanted, strict=True):
            out[...] = self._mapped[image]  # NumPy frees Python's lock while it copies, and so while the disk is read
        return piece
