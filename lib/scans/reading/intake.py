"""A folder of scans as a cohort: which cases can be used, which of their slices, and which are held out."""

import hashlib
import re
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib import DataError
from lib.cohorts.cohort import UNDRAWN
from lib.cohorts.reading import turned
from lib.cohorts.volumes import OwnCohort, scaled
from lib.compute import out_of_memory
from lib.runs.cluster import mapped
from lib.runs.versions import fingerprint
from lib.scans.reading.drawing import drawn_part
from lib.scans.reading.folder import read_case
from lib.scans.reading.planning import placed, seen_whole

HELD_OUT_FROM = 10  # labelled subjects; with fewer all train, and two quick networks say what confidence means
IMAGES = "at the plan's spacing, labels by share"  # how images are made; another way has another name


class Intake(NamedTuple):
    """What a folder holds."""

    cases: list  # folder.Case, those that could be read
    failures: dict  # name of the others to what is wrong
    notes: dict  # name to what is odd about a case, but no failure
    values: list  # label values of the masks, background left out

    @property
    def labelled(self):
        return [case for case in self.cases if case.mask]


def digest(file):
    """sha256 of a file's bytes, or a fingerprint of all files of a DICOM series.

    Raises:
        DataError: it cannot be read.
    """
    try:
        if file.is_dir():  # a DICOM series
            return fingerprint([digest(part) for part in sorted(file.iterdir()) if part.is_file()])
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): check its permissions, or copy it again") from error


def prints_of(case, settings, plans):
    """Fingerprint of what a case's images are made from, one for every plan."""
    files = [digest(file) for file in case.files]
    seen = [case.region] if case.region else []
    return [fingerprint(files, list(plan), settings.labels, settings.drawn, IMAGES, *seen) for plan in plans]


class Reading(NamedTuple):
    """What a case gives for the stores."""

    keys: tuple = ()  # see prints_of
    contents: tuple = ()  # for every plan: images, labels, drawn, what else the index shall say; empty if it is known
    failure: str = ""  # what is wrong with the case


def read_in(settings, plans, allowed, case, known):
    """The Reading of a case; ``known`` are the keys of what the stores have of it. Can run on any worker."""
    try:
        keys, axis = prints_of(case, settings, plans), plans[0].axis
        if keys == known:
            return Reading(keys)
        channels, labels, grid = read_case(case, axis, allowed)
        if seen_whole(plans) and grid.slices[0] == 1:
            raise DataError(f"{case.image} is a single slice among volumes: leave it out, or set folder.space=slices")
        drawn, more = None, {"values": [], "taken": ""}
        if labels is not None:
            labels, drawn, taken = drawn_part(labels, settings.drawn, axis)
            more = {"values": np.unique(labels[labels > 0]).tolist(), "taken": taken}
        for k, channel in enumerate(channels):  # one by one: the originals need not stay
            channels[k] = scaled(channel)
        contents = []
        for plan in plans:
            same = plan.axis == axis  # then a single slice keeps its own direction
            to = lambda stack: stack if same or stack is None else turned(stack, axis, plan.axis)
            on = grid if same else grid.along(plan.axis)
            images = np.stack([plan.images(to(channel), on) for channel in channels], axis=1).astype(np.float16)
            masks = None, None
            if labels is not None:
                masks = plan.labels(to(labels), on, to(drawn)), plan.drawn(to(drawn), on)
            contents.append((images, *masks, more))
        return Reading(keys, contents)
    except DataError as error:
        return Reading(failure=str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Reading(failure=f"{case.image} does not fit into memory: crop it, or split it into several files")


def take_in(settings, found, stores, client=None):
    """Read every case of a folder into stores; one that cannot be read is reported and does not stop the others.

    Args:
        settings: section ``folder`` of params.yaml.
        found: list of folder.Case.
        stores: list of store.Store, one for every plan.
        client: whose workers read, see runs.cluster; None reads here.

    Returns:
        Intake.

    Raises:
        DataError: the settings cannot be used.
        OSError: the store's disk is full: what cannot be kept is no fault of the case.
    """
    plans = [store.plan for store in stores]
    if settings.symmetric and not any(plan.mirrored(True) for plan in plans):
        raise DataError(
            "folder.symmetric flips left and right, which slices along folder.axis 0 do not have: set it to false"
        )
    range_of(settings.slices)
    cases, failures, notes, values = [], {}, {}, set()
    allowed = {0, *settings.labels, *[settings.drawn] * isinstance(settings.drawn, int)} if settings.labels else None
    read = partial(read_in, settings, plans, allowed)
    known = [[store.index.get(case.name, {}).get("fingerprint") for store in stores] for case in found]
    readings = zip(found, mapped(client, read, found, known))
    for case, reading in tqdm(readings, desc="reading", unit="case", total=len(found)):
        whole = reading.contents or all(store.has(case.name, key) for store, key in zip(stores, reading.keys))
        if not (reading.failure or whole):  # it is spoilt
            reading = read(case, None)
        for store, key, (images, labels, drawn, more) in zip(stores, reading.keys, reading.contents):
            if not store.has(case.name, key):
                store.add(case.name, key, images, labels, drawn, **more)
        failure = reading.failure or unusable(case, settings, stores[0])
        if failure:
            failures[case.name] = failure
            continue
        cases.append(case)
        if case.mask:
            values |= set(stores[0].index[case.name]["values"])
            if note := odd(case, stores):
                notes[case.name] = note
    return Intake(cases, failures, notes, sorted(values))


def unusable(case, settings, store):
    """Why a case that could be read has nothing to be segmented, or nothing."""
    first, last = range_of(settings.slices) or (0, 0)
    count = len(store.images(case.name))
    if len(range(count)[first : last + 1]) or range_of(settings.slices) is None:
        return ""
    return f"{case.image} has {count} slices, none from {first} to {last}: change folder.slices"


def odd(case, stores):
    """What is odd about the mask of a case, or nothing."""
    entry = stores[0].index[case.name]
    if not entry["values"]:
        return f"{case.mask} marks nothing: remove it unless nothing is there to be marked"
    for store in stores:
        small = f"for {store.plan.title}: {finer(store.plan)}"
        if lost := set(entry["values"]) - set(np.unique(store.labels(case.name)).tolist()):
            return f"{case.mask}: label {min(lost)} is too small {small}"
        if (drawn := store.drawn(case.name)) is not None and not drawn.any():
            return f"{case.mask}: what is drawn is too thin {small}"
    return entry["taken"]


def finer(plan):
    """What to do if a structure is lost at a plan's spacing."""
    return f"raise folder.{'voxels' if plan.space == 'volumes' else 'size'}"


def range_of(slices):
    """(first, last) where folder.slices is a range, else None.

    Raises:
        DataError: it is neither that nor all nor largest.
    """
    if slices in ("all", "largest"):
        return None
    try:
        first, last = map(int, slices)
    except (TypeError, ValueError):
        raise DataError(f"folder.slices is '{slices}', not all, largest or two numbers [first, last]") from None
    return first, last


def chosen_slices(settings, store, cases):
    """Which slices of every case are used: dictionary of name to positions."""
    if settings.slices == "all":
        return {case.name: np.arange(len(store.images(case.name))) for case in cases}
    if settings.slices == "largest":
        marked = {case.name: (store.labels(case.name) > 0).sum(axis=(1, 2)) for case in cases if case.mask}
        largest = {name: int(area.argmax()) for name, area in marked.items()}
        height = np.mean([place / max(1, len(marked[name]) - 1) for name, place in largest.items()]) if largest else 0.5
        return {
            case.name: np.array([largest.get(case.name, round(height * (len(store.images(case.name)) - 1)))])
            for case in cases
        }
    first, last = range_of(settings.slices)
    return {case.name: np.arange(len(store.images(case.name)))[first : last + 1] for case in cases}


def chosen_images(settings, stores, cases):
    """As ``chosen_slices``: dictionary of name to a list of positions, one array for every store."""
    each = [chosen_slices(settings, store, cases) for store in stores]
    return {case.name: [found[case.name] for found in each] for case in cases}


def subjects_of(names, pattern):
    """Dictionary of subject to its cases: those whose names agree in the pattern's first group.

    Args:
        names: of cases.
        pattern: regular expression. A case without a match is a subject of its own; if it is empty, every case is.

    Raises:
        DataError: it is no regular expression with a group.
    """
    try:
        if pattern and not re.compile(pattern).groups:
            raise re.error("there is no group in it")
        found = {name: re.search(pattern, name) if pattern else None for name in names}
    except re.error as error:
        raise DataError(f"folder.subject '{pattern}' cannot be used ({error}): write e.g. (sub-[0-9]+)") from error
    subjects = {}
    for name, match in found.items():
        subjects.setdefault((match[1] if match else None) or name, []).append(name)
    return subjects


def folds_of(subjects, seed, quick=1.0):
    """What is held out from the network, and from every quick network.

    Cases of one subject are held out together. A single subject cannot be held out: nothing is. Nor is anything if
    ``quick`` is 0.

    Args:
        subjects: of ``subjects_of``.
        quick: folder.quick.

    Returns:
        List of tuples of names: first of those held out from the network, then of those from every quick network.
    """
    if not quick:
        return [()]
    cases = list(subjects.values())
    order = np.random.default_rng([seed, 2]).permutation(len(cases))
    names = lambda chosen: tuple(name for k in sorted(chosen) for name in cases[k])
    if len(cases) >= HELD_OUT_FROM:
        return [names(order[: round(len(cases) / 5)])]
    return [(), *(sorted((names(order[::2]), names(order[1::2]))) if len(cases) > 1 else [])]


def build(settings, store, intake, held_out):
    """The cohort of one fold, as the store's plan has it.

    Args:
        settings: as params.load gives them.
        held_out: names of the labelled cases that validate; if there are none, those that train validate too.

    Returns:
        OwnCohort. It lies in memory, so slices are thinned evenly: at most folder.unlabelled without masks, and with
        masks at most folder.labelled that train and as many that validate.
    """
    options, plan = settings.folder, store.plan
    slices = chosen_slices(options, store, intake.cases)
    every = [(case.name, k) for case in intake.cases for k in slices[case.name]]
    with_mask = {(case.name, k) for case in intake.labelled for k in drawn_images(store, case.name, slices[case.name])}
    free, drawn = ([row for row in every if (row in with_mask) == masked] for masked in (False, True))
    held = [row for row in drawn if row[0] in held_out]
    rows = [
        (name, int(k), split, masked)
        for group, most, split, masked in (
            (free, options.unlabelled, "train", False),
            ([row for row in drawn if row[0] not in held_out], options.labelled, "train", True),
            (held or drawn, options.labelled, "validation", True),
        )
        for name, k in thinned(group, most)
    ]
    middle = lambda labels: placed(labels[None], plan.canvas)[0]  # of a scan that is larger than the canvas
    empty = np.zeros(plan.canvas, np.uint8)
    to_class = np.zeros(256, np.uint8)
    to_class[intake.values] = np.arange(1, len(intake.values) + 1)
    return OwnCohort(
        name="folder",
        title="own data",
        symmetric=plan.mirrored(options.symmetric),
        pixel_mm=min(plan.spacing),
        voxel_mm=np.array(plan.spacing),
        classes=class_names(intake.values),
        # Each is copied at once: what remains a view of the map keeps its file open.
        images=np.stack([placed(store.images(name)[k].astype(np.float32), plan.canvas) for name, k, *_ in rows]),
        labels=np.stack(
            [middle(own_labels(store, name, k, to_class)) if masked else empty for name, k, _, masked in rows]
        ),
        subjects=np.array([name for name, *_ in rows]),
        split=np.array([split for *_, split, _ in rows]),
        masked=np.array([masked for *_, masked in rows]),
        volumes=np.array([f"{name}/{split}" for name, _, split, _ in rows]),
        positions=np.array([k / max(1, len(store.images(name)) - 1) for name, k, *_ in rows], np.float32),
        ranks=np.zeros(len(rows), int),
        shapes=np.zeros((0, 3), int),
        boxes=np.zeros((0, 4), int),
        truth=np.zeros(0, np.uint8),
    )


def drawn_images(store, name, positions):
    """Those of a case's images in which anything was drawn."""
    drawn = store.drawn(name)
    return positions if drawn is None else [k for k in positions if drawn[k].any()]


def own_labels(store, name, position, to_class):
    """Labels of one image as the cohort has them; ``to_class`` gives the class of every label value."""
    labels, drawn = to_class[store.labels(name)[position]], store.drawn(name)
    return labels if drawn is None else np.where(drawn[position] > 0, labels, np.uint8(UNDRAWN))


def thinned(items, most):
    """At most so many of the items, evenly spread."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int)]


def class_names(values):
    """What the label values are called in tables."""
    return tuple(f"label {value}" for value in values)
