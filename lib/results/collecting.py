"""Results of single experiments, brought together: those of the pipeline and those of the grid."""

import numpy as np
import pandas as pd

from lib import DataError
from lib.methods import table
from lib.results import grid
from lib.runs.params import results_folder

KEYS = ["cohort", "recipe", "rate", "seed", "variant"]
ROUNDS = [
    *KEYS,
    "stage",
    "round",
    "split",
    "n",
    "dsc_segmentation",
    "dsc_registration",
    "dsc_pseudo_masks",
    "mean_confidence",
    "folding",
    "weight",
    "best_for",
]
REGISTRATION = [
    *KEYS,
    "stage",
    "round",
    "split",
    "n",
    "dsc_unregistered",
    "dsc_single",
    "gncc_before",
    "gncc_after",
    "folding",
    "inverse_consistency",
]


def folders(settings):
    """Where results of single experiments lie: those of the grid, then the pipeline's own, which take precedence."""
    return [*grid.finished(settings), results_folder(settings) / "items" / f"{settings.rate:g}-seed_{settings.seed}"]


def collect(settings):
    """All results of a cohort: (per image, reliability bins, rounds), one experiment once.

    Raises:
        DataError: there are none.
    """
    found = []
    for name in ("per_image", "reliability", "rounds"):
        frames = []
        for folder in folders(settings):
            if (folder / f"{name}.csv").exists():
                frame = pd.read_csv(
                    folder / f"{name}.csv",
                    dtype={"subject": str, "variant": str},
                    keep_default_na=False,
                    na_values=[""],
                )
                frame["variant"] = frame["variant"].fillna("")
                frames.append(frame)
        if not frames:
            raise DataError(f"no {name}.csv under {results_folder(settings) / 'items'}: run notebooks 2 to 8 first")
        late = {
            key: number for number, frame in enumerate(frames) for key in frame[owner(frame)].itertuples(index=False)
        }
        kept = [
            frame[[late[key] == number for key in frame[owner(frame)].itertuples(index=False)]]
            for number, frame in enumerate(frames)
        ]
        found.append(pd.concat(kept, ignore_index=True))
    found[2] = found[2].reindex(columns=list(dict.fromkeys([*ROUNDS, *REGISTRATION])))
    return found


def owner(frame):
    """Columns that say which experiment a row belongs to."""
    return [column for column in (*KEYS, "method") if column in frame]


def collect_watched(settings):
    """Masks that methods gave one image during training: dictionary of label to (steps, masks).

    Of the settings' seed and, as in Figure 2 of P1, at the settings' rate and at 10 %.
    """
    found = {}
    for folder in folders(settings):
        for stage in table.stages():
            for file in sorted(folder.glob(f"{stage.name}_*.npz")) if stage.watched else ():
                row = pd.read_csv(folder / "per_image.csv", nrows=1).iloc[0]
                if row["seed"] == settings.seed and row["rate"] in (settings.rate, 10):
                    recipe = file.stem.removeprefix(f"{stage.name}_")
                    with np.load(file) as archive:
                        found[stage.watched, recipe, float(row["rate"])] = archive["steps"], archive["masks"]
    return {f"{name}, {rate:g} %\n{recipe} recipe": value for (name, recipe, rate), value in sorted(found.items())}
