"""Slices of any number of scans on disk, read through a memory map: what does not fit into memory need not."""

import json
import os
from pathlib import Path

import numpy as np

from lib import DataError


class Store:
    """Slices of one size, those of a case together, each case once.

    A case is written first, then named in the index: after a crash it is either whole or not there. A case whose
    file has changed is appended anew.

    Args:
        folder: where the store lies; made if need be.
        size: side of the slices.
    """

    def __init__(self, folder, size):
        self.folder = Path(folder)
        self.size = size
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = {}
        for entry in read_lines(self.folder / "index.jsonl"):
            if entry["size"] != size:
                raise DataError(f"{self.folder} holds slices of {entry['size']} pixels, not {size}: delete it")
            self.index[entry["name"]] = entry

    def has(self, name, fingerprint):
        """Whether the case is there, made from what ``fingerprint`` stands for."""
        entry = self.index.get(name)
        return entry is not None and entry["fingerprint"] == fingerprint and self._is_whole(entry)

    def _is_whole(self, entry):
        """Whether the files reach as far as the index says: another program may have cut or removed them."""
        for file, start, width in (("images.bin", entry["image"], 2), ("labels.bin", entry["labels"], 1)):
            end = 0 if start is None else start + width * entry["count"] * self.size**2
            if end and (not (self.folder / file).exists() or (self.folder / file).stat().st_size < end):
                return False
        return True

    def add(self, name, fingerprint, slices, labels=None):
        """Write a case.

        Args:
            slices: ``(slices, size, size)`` in [0, 1], kept as float16.
            labels: the same shape, uint8, or None.

        Raises:
            OSError: the disk is full or the folder cannot be written to.
        """
        entry = {"name": name, "fingerprint": fingerprint, "size": self.size, "count": len(slices),
                 "image": self._append("images.bin", slices.astype(np.float16)),
                 "labels": None if labels is None else self._append("labels.bin", labels.astype(np.uint8))}
        append_line(entry, self.folder / "index.jsonl")
        self.index[name] = entry

    def _append(self, name, array):
        """Append an array to a file; returns where it begins, in bytes."""
        with open(self.folder / name, "ab") as stream:
            start = stream.tell()
            try:
                stream.write(np.ascontiguousarray(array).data)
                stream.flush()
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(start)  # what the full disk took of it
                raise
        return start

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


def append_line(entry, file):
    """Append a dictionary to a file of one JSON text a line, for good."""
    with open(file, "a") as stream:
        start = stream.tell()
        try:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(start)  # what the full disk took of it
            raise


def read_lines(file):
    """The dictionaries that ``append_line`` wrote, as a list; a last line that a crash cut short is removed.

    Raises:
        DataError: it is another file.
    """
    entries, end = [], 0
    if not file.exists():
        return entries
    for line in (content := file.read_bytes()).splitlines(keepends=True):
        try:
            entry = json.loads(line)
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                raise ValueError("not a line of its own")
        except ValueError as error:
            if end + len(line) < len(content):
                raise DataError(f"{file} is damaged ({error}): delete {file.parent}") from error
            os.truncate(file, end)
            break
        entries.append(entry)
        end += len(line)
    return entries
