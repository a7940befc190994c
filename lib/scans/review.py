"""Looking at what was segmented: the least certain cases, their predicted DSC, and a viewer of all."""

from functools import lru_cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lib.cohorts.reading import read_grid, read_scan
from lib.cohorts.volumes import scaled
from lib.metrics import dice
from lib.results.calibration import predict_dsc
from lib.results.figures.plots import OTHER, draw
from lib.results.figures.viewer import Viewer
from lib.scans.reading.folder import find_cases, nifti_files
from lib.scans.reading.planning import seen_whole


class Review:
    """The results of segment_folder, read back from its files.

    Args:
        settings: as segment_folder got them.
        table: what it gave, cases.csv.
        model: model_file.Model that made them.
    """

    def __init__(self, settings, table, model):
        self.settings, self.model = settings, model
        self.table = table[table["status"] == "done"].set_index("case")
        options = settings.folder
        self.output = Path(options.output)
        self.cases = {
            case.name: case
            for case in find_cases(options.images, options.masks or None, options.pattern, options.channels)
        }
        self.volumes = lru_cache(1)(self.volumes)  # one may be gigabytes

    def volumes(self, name):
        """What there is of a case, ``(slices, rows, columns)`` each, and the size of its voxels.

        Returns:
            (image in [0, 1], labels, confidence, hand-drawn labels or None, mm between slices, rows and columns).
        """
        case, axis = self.cases[name], self.model.plans[0].axis
        labels, confidence = (
            read_scan(self.output / f"{name}_{what}.nii.gz", axis)[0] for what in ("mask", "confidence")
        )
        drawn = read_scan(case.mask, axis)[0].astype(np.uint8) if case.mask else None
        image, grid = read_scan(case.image, axis)
        return scaled(image), labels.astype(np.uint8), confidence, drawn, grid.spacing

    def channels(self, labels):
        """Labels ``(rows, columns)`` as masks ``(classes, rows, columns)``."""
        return np.stack([labels == value for value in self.model.about["values"]]).astype(np.float32)

    def dsc_with(self, folder):
        """DSC of every case that has a mask in ``folder``, mean over classes: pandas.Series of case to DSC."""
        scores = {}
        for name, file in nifti_files(folder, "masks").items():
            if name in self.table.index:
                pair = [
                    torch.as_tensor(np.stack([self.channels(one) for one in labels], axis=1))[None]
                    for labels in (self.volumes(name)[1], read_scan(file, self.model.plans[0].axis)[0])
                ]
                scores[name] = float(dice(*pair).mean())
        return pd.Series(scores, name="dsc", dtype=float)

    def agreement(self, true_dsc):
        """How well the predicted DSC agrees with the true one.

        Args:
            true_dsc: as ``dsc_with`` gives it.

        Returns:
            pandas.Series: masks (their number), dsc and predicted_dsc (means), error (of the predicted DSC, mean of its
            absolute values), worst_dsc, inside (how many lie within their interval; NaN where there is none), spearman
            (of confidence and true DSC) and flagged.
        """
        table = self.table.loc[true_dsc.index]
        inside = true_dsc.between(table["predicted_low"], table["predicted_high"])
        return pd.Series(
            {
                "masks": len(table),
                "dsc": true_dsc.mean(),
                "predicted_dsc": table["predicted_dsc"].mean(),
                "error": (table["predicted_dsc"] - true_dsc).abs().mean(),
                "worst_dsc": true_dsc.min(),
                "inside": inside.sum() if table["predicted_low"].notna().any() else np.nan,
                "spearman": table["confidence"].corr(true_dsc, "spearman"),
                "flagged": int(table["review"].sum()),
            }
        )

    def contact_sheet(self, count=12, columns=6):
        """The least certain cases: image with mask above, confidence below, where most is marked.

        Scans that were seen whole are shown in three planes.
        """
        worst = self.table.sort_values(["predicted_dsc", "confidence"]).head(count)
        across = range(3 if seen_whole(self.model.plans) else 1)
        high, columns = len(across) + 1, min(columns, len(worst))
        rows = -(-len(worst) // columns)
        figure, axes = plt.subplots(high * rows, columns, figsize=(2.1 * columns, 2.5 * high * rows), squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for k, (name, row) in enumerate(worst.iterrows()):
            image, labels, confidence, _, spacing = self.volumes(name)
            *above, below = axes[high * (k // columns) : high * (k // columns) + high, k % columns]
            title = f"{name}\npredicted DSC {row['predicted_dsc']:.2f}"
            for axis, ax in zip(across, above):
                seen, marked = plane_of(image, labels, axis), plane_of(labels, labels, axis)
                draw(ax, seen, self.channels(marked), title if axis == 0 else "", colour=OTHER)
                ax.set_aspect(aspect_of(spacing, axis))
            heat = 2 * (1 - plane_of(confidence, labels, 0))
            draw(below, plane_of(image, labels, 0), heat=heat, title=f"confidence {row['confidence']:.2f}")
            below.set_aspect(aspect_of(spacing, 0))
        figure.tight_layout()
        return figure

    def predictions(self, true_dsc=None):
        """Predicted DSC of every case over its confidence, and the held-out cases that it is learnt from.

        Args:
            true_dsc: pandas.Series of case to DSC, if there are masks that were hidden from training.
        """
        figure, ax = plt.subplots(figsize=(5.6, 3.8))
        pairs = np.reshape(self.model.about["calibration"], (-1, 3))
        every = np.concatenate((self.table["confidence"], pairs[:, 1]))
        spread = np.linspace(every.min(), every.max(), 50)
        predicted, low, high = np.transpose([predict_dsc(pairs, x) for x in spread])
        ax.plot(spread, predicted, color="black", label="predicted DSC")
        if np.isfinite(low).all():
            ax.fill_between(spread, low, high, color="black", alpha=0.1, label="95 % prediction interval")
        ax.plot(*pairs.T[1:], ".", color="#1f77b4", alpha=0.5, label="held-out cases, and worse views of them")
        if true_dsc is not None:
            ax.plot(
                self.table["confidence"][true_dsc.index], true_dsc, ".", color="#d62728", label="masks that were hidden"
            )
        ax.axhline(self.settings.folder.review, color="grey", linestyle=":", label="to be reviewed below")
        ax.set(xlabel="confidence of the mask", ylabel="DSC", ylim=(-0.02, 1.02))
        ax.legend(fontsize=7, loc="lower right")
        figure.tight_layout()
        return figure

    def viewer(self):
        """A Viewer of all cases, the least certain first."""
        order = self.table.sort_values(["predicted_dsc", "confidence"]).index
        counts = {name: read_grid(self.cases[name].image, self.model.plans[0].axis).slices[0] for name in order}

        def look(name, number, _):
            image, labels, confidence, drawn, spacing = self.volumes(name)
            found = {
                "image": image[number],
                "prediction": self.channels(labels[number]),
                "confidence": confidence[number],
                "aspect": aspect_of(spacing, 0),
            }
            return found if drawn is None else {**found, "true mask": self.channels(drawn[number])}

        return Viewer(counts, look, classes=self.model.about["classes"])


def plane_of(volume, labels, axis):
    """The plane of ``volume`` across ``axis`` in which most of ``labels`` is marked; both (slices, rows, columns)."""
    others = tuple(other for other in range(3) if other != axis)
    at = int((labels > 0).sum(axis=others).argmax())
    plane = volume.take(at, axis)
    return plane if axis == 0 else plane[::-1]  # the last slice lies highest, or furthest to the front or right


def aspect_of(spacing, axis):
    """Height of a pixel of ``plane_of`` over its width."""
    row, column = (mm for other, mm in enumerate(spacing) if other != axis)
    return row / column
