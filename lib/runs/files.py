"""Files that are either whole or not there, whatever happens while they are written."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile, ZipInfo

import numpy as np

from lib import parallel


@contextmanager
def replacing(file):
    """Context in which a file is written beside its place; it is put there when it is whole and on the disk.

    What happens meanwhile, a power cut as well, leaves the old file as it was. The folder is made if need be. Of
    processes that train together the first one puts it there.

    Yields:
        Path to write to, of the same endings.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    first = parallel.is_first()
    partial = file.with_name(f".partial.{'' if first else os.environ['RANK'] + '.'}{file.name}")
    try:
        yield partial
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())  # what is renamed before may be empty after a power cut
        if first:
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(arrays, file):
    """Write arrays, by name, as one .npz file that numpy.load reads.

    The same arrays give the same bytes with every version of Python, unless one is above 2 GB. Those of numpy.savez
    differ: it asks for large headers always, and Python 3.11.4 changed them.

    Args:
        arrays: dictionary of name to array, none of them of objects.
        file: path that ends with .npz.

    Raises:
        OSError: see ``replacing``.
    """
    with replacing(file) as partial, ZipFile(partial, "w") as archive:
        for name, values in arrays.items():
            values, about = np.asarray(values), ZipInfo(f"{name}.npy")
            about.file_size = values.nbytes  # by which the archive chooses the kind of header
            with archive.open(about, "w") as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def append(content, file):
    """Append bytes to a file, all or none of them, for good; returns where they begin.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    with open(file, "ab") as stream:
        start = stream.tell()
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(start)  # what the full disk took of it
            raise
    return start


def append_line(entry, file):
    """Append a dictionary to a file of one JSON text a line, see ``append``."""
    append((json.dumps(entry) + "\n").encode(), file)


def read_lines(file, key):
    """The dictionaries that ``append_line`` wrote, by the value of ``key``, the last of each.

    Lines that are damaged are left out, so that what they stood for is made again; a last one that a crash cut short
    is removed.
    """
    entries = {}
    content = file.read_bytes() if file.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)
    for line in content[:whole].splitlines():
        try:
            entry = json.loads(line)
            entries[entry[key]] = entry
        except (ValueError, TypeError, KeyError):
            continue
    return entries
