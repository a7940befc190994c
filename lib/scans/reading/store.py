"""Images of any number of scans on disk, read through a memory map: what does not fit into memory need not."""

import zlib
from pathlib import Path

import numpy as np

from lib.runs.files import append, append_line, read_lines


class Store:
    """Images of every case, its slices or the volume, each case once.

    A case is written first, then named in the index with its checksum. If a crash, another program or the disk has
    spoilt it, ``has`` is false, and it is to be added again. A case whose file has changed is appended anew.

    Args:
        folder: where the store lies; made if need be.
        plan: planning.Plan by which the images are made; whoever only reads them needs none.
    """

    def __init__(self, folder, plan=None):
        self.folder, self.plan = Path(folder), plan
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = read_lines(self.folder / "index.jsonl", "name")

    def has(self, name, fingerprint):
        """Whether the case is there, made from what ``fingerprint`` stands for."""
        entry = self.index.get(name)
        if entry is None or entry.get("fingerprint") != fingerprint:
            return False
        try:
            return entry["checksum"] == checksum(self.images(name), self.labels(name), self.drawn(name))
        except (OSError, ValueError, TypeError, KeyError):  # of a map of files that are cut short or gone
            return False

    def add(self, name, fingerprint, images, labels=None, drawn=None, **more):
        """Write a case.

        Args:
            images: ``(n, channels, *space)`` in [0, 1], kept as float16.
            labels: ``(n, *space)`` uint8, or None.
            drawn: ``(n, *space)`` boolean, which pixels of the labels were drawn, or None for all.
            more: what else the index shall say of it, as JSON has it.

        Raises:
            OSError: the disk is full or the folder cannot be written to.
        """
        whole = lambda array: None if array is None else array.astype(np.uint8)
        images, labels, drawn = images.astype(np.float16), whole(labels), whole(drawn)
        entry = {
            "name": name,
            "fingerprint": fingerprint,
            "shape": images.shape,
            "checksum": checksum(images, labels, drawn),
            "image": self._append("images.bin", images),
            "labels": None if labels is None else self._append("labels.bin", labels),
            "drawn": None if drawn is None else self._append("drawn.bin", drawn),
            **more,
        }
        append_line(entry, self.folder / "index.jsonl")
        self.index[name] = entry

    def _append(self, name, array):
        """Append an array to a file; returns where it begins, in bytes."""
        return append(np.ascontiguousarray(array).data, self.folder / name)

    def images(self, name):
        """``(n, channels, *space)`` of a case in [0, 1], as a read-only memory map of float16."""
        return self._map("images.bin", np.float16, name, "image")

    def labels(self, name):
        """``(n, *space)`` uint8 of a case, or None where it has none."""
        return self._map("labels.bin", np.uint8, name, "labels")

    def drawn(self, name):
        """``(n, *space)`` 0 or 1 of a case, where its labels were drawn, or None where all are."""
        return self._map("drawn.bin", np.uint8, name, "drawn")

    def _map(self, file, kind, name, key):
        entry = self.index[name]
        if entry[key] is None:
            return None
        shape = entry["shape"] if key == "image" else [entry["shape"][0], *entry["shape"][2:]]
        return np.memmap(self.folder / file, kind, "r", entry[key], tuple(shape))


def images_of(stores, name, positions):
    """A case's images in every store, those at ``positions``, one array for every store."""
    return [store.images(name)[at] for store, at in zip(stores, positions)]


def checksum(*arrays):
    """CRC-32 of a case; any array may be None."""
    value = 0
    for array in arrays:
        value = zlib.crc32(b"" if array is None else np.ascontiguousarray(array), value)
    return value
