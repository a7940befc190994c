"""Slices of any number of scans on disk, read through a memory map: what does not fit into memory need not."""

import zlib
from pathlib import Path

import numpy as np

from lib import DataError
from lib.runs.files import append, append_line, read_lines


class Store:
    """Slices of one size, those of a case together, each case once.

    A case is written first, then named in the index with its checksum. If a crash, another program or the disk has
    spoilt it, ``has`` is false, and it is to be added again. A case whose file has changed is appended anew.

    Args:
        folder: where the store lies; made if need be.
        size: side of the slices.
    """

    def __init__(self, folder, size):
        self.folder = Path(folder)
        self.size = size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = read_lines(self.folder / "index.jsonl", "name")
        for entry in self.index.values():
            if entry.get("size") != size:
                raise DataError(f"{self.folder} holds slices of {entry.get('size')} pixels, not {size}: delete it")

    def has(self, name, fingerprint):
        """Whether the case is there, made from what ``fingerprint`` stands for."""
        entry = self.index.get(name)
        if entry is None or entry.get("fingerprint") != fingerprint:
            return False
        try:
            return entry["checksum"] == checksum(self.images(name), self.labels(name))
        except (OSError, ValueError, TypeError, KeyError):  # of a map of files that are cut short or gone
            return False

    def add(self, name, fingerprint, slices, labels=None, **more):
        """Write a case.

        Args:
            slices: ``(slices, size, size)`` in [0, 1], kept as float16.
            labels: the same shape, uint8, or None.
            more: what else the index shall say of it, as JSON has it.

        Raises:
            OSError: the disk is full or the folder cannot be written to.
        """
        slices, labels = slices.astype(np.float16), None if labels is None else labels.astype(np.uint8)
        entry = {
            "name": name,
            "fingerprint": fingerprint,
            "size": self.size,
            "count": len(slices),
            "checksum": checksum(slices, labels),
            "image": self._append("images.bin", slices),
            "labels": None if labels is None else self._append("labels.bin", labels),
            **more,
        }
        append_line(entry, self.folder / "index.jsonl")
        self.index[name] = entry

    def _append(self, name, array):
        """Append an array to a file; returns where it begins, in bytes."""
        return append(np.ascontiguousarray(array).data, self.folder / name)

    def images(self, name):
        """``(slices, size, size)`` of a case in [0, 1], as a read-only memory map of float16."""
        return self._map("images.bin", np.float16, name, "image")

    def labels(self, name):
        """``(slices, size, size)`` uint8 of a case, or None where it has none."""
        return None if self.index[name]["labels"] is None else self._map("labels.bin", np.uint8, name, "labels")

    def _map(self, file, kind, name, key):
        entry = self.index[name]
        shape = (entry["count"], self.size, self.size)
        return np.memmap(self.folder / file, kind, "r", entry[key], shape)


def checksum(slices, labels):
    """CRC-32 of a case; ``labels`` may be None."""
    return zlib.crc32(b"" if labels is None else np.ascontiguousarray(labels), zlib.crc32(np.ascontiguousarray(slices)))
