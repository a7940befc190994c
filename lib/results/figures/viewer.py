"""A viewer for notebooks: choose case, slice, round and layer, and see what the networks say there.

It is a widget over matplotlib, live in JupyterLab as long as the kernel runs. Where no widget can be shown (papermill,
nbconvert, GitHub, a notebook that is opened again) there is a still picture below it, with all layers of one slice.
"""

from functools import lru_cache
from html import escape
from io import BytesIO
from pathlib import Path
from traceback import format_exc

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import Image, display
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from traitlets import link

from lib.methods.experiment import finished_rounds, load_round
from lib.metrics import harden
from lib.results.figures.plots import TRUE, array, draw, draw_grid, outline

LAYERS = {  # what can be seen, and what it is
    "image": "the slice as the networks see it",
    "true mask": "the hand-drawn mask, where there is one; that of an unlabelled image is hidden from training",
    "prediction": "the mask of every class",
    "confidence": "probability of the most probable class; 1 is certain, and left transparent",
    "disagreement": "absolute difference between the mean segmentation mask and the mean warped mask",
    "segmentation masks": "what the segmentation network says of N augmented views, mapped back",
    "warped masks": "masks of N labelled images, registered to this one",
    "displacement": "where the N registrations take a regular grid on the labelled images",
}
SETS = {"segmentation masks": "view", "warped masks": "source", "displacement": "source"}  # and what one of them is of
HEATS = {"confidence": ("inferno_r", 0.5, 1), "disagreement": ("inferno", 0, 1)}  # colours and fixed range
COLOURS = ("#ffb000", "#3d9be9", "#e6399b", "#35d0d6", "#a98bff", "#ff6b4a", "#f4f06a", "#c08457")  # of classes


class Viewer:
    """Case, slice, round and layer to choose from, and the picture.

    Args:
        cases: dictionary of a case's name to its number of slices, in the order in which they are offered.
        layers: function of (name of the case, slice from 0, round) that gives a dictionary with some of LAYERS:
            image ``(height, width)`` in [0, 1], always; true mask and prediction ``(classes, height, width)``, 0 or 1;
            confidence ``(height, width)`` in [0, 1]; disagreement ``(height, width)`` or ``(classes, height, width)``
            in [0, 1]; segmentation masks and warped masks ``(n, classes, height, width)`` in [0, 1]; displacement
            ``(n, 2, height, width)`` in pixels; and aspect, the height of a pixel over its width. Tensors will do. It
            is called when a slice is first looked at, and the last ``kept`` answers are kept. Where it raises, the
            traceback stands in the picture's place.
        rounds: what the slider of rounds goes through; it starts at the last, and is hidden where there is one only.
        classes: names of the classes, for the legend.
        offered: the layers to choose from.
        kept: how many slices are kept in memory.

    Every control is reached by Tab; arrow keys move a slider, Enter presses a button, Space ticks the box. JupyterLab
    keeps the keys of a dropdown for itself, hence the slider beside that of the cases.
    """

    def __init__(self, cases, layers, rounds=(0,), classes=(), offered=tuple(LAYERS), kept=32):
        self.cases, self.classes, self.offered = dict(cases), tuple(classes), tuple(offered)
        self.layers = lru_cache(kept)(layers)
        self.render = lru_cache(8 * kept)(self.render)
        first, rounds = next(iter(self.cases)), list(rounds)
        wide = {"width": "420px"}
        self.case = widgets.Dropdown(options=list(self.cases), value=first, description="case", layout=wide)
        self.number = widgets.IntSlider(max=len(self.cases) - 1, readout=False, layout={"width": "300px"})
        self.slice = widgets.IntSlider(min=1, description="slice", layout=wide)
        self.round = widgets.SelectionSlider(options=rounds, value=rounds[-1], description="round", layout=wide)
        self.layer = widgets.ToggleButtons(
            options=["all", *self.offered],
            value="prediction" if "prediction" in self.offered else self.offered[0],
            tooltips=["all layers at once", *map(LAYERS.get, self.offered)],
            style={"button_width": "auto"},
        )
        self.outlined = widgets.Checkbox(value=True, description="outline of the true mask", indent=False)
        self.status, self.meaning = widgets.Label(), widgets.Label(style={"text_color": "gray"})
        self.picture, self.error = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML()
        self.status.add_class("viewer-status")
        self.place = widgets.VBox((self.picture,), layout={"align_items": "flex-start"})
        self.widget = widgets.VBox(
            (
                widgets.HBox((self.case, self.number)),
                self.slice,
                self.round,
                self.layer,
                self.outlined,
                self.status,
                self.meaning,
                self.place,
            )
        )
        for control, choices in ((self.number, self.cases), (self.round, rounds)):
            control.layout.display = "none" if len(choices) == 1 else None
        self.open_case()
        self.case.observe(self.open_case, "value")
        link((self.case, "index"), (self.number, "value"))
        for control in (self.slice, self.round, self.layer, self.outlined):
            control.observe(self.draw, "value")

    @property
    def chosen(self):
        """(name of the case, slice from 0, round)."""
        return self.case.value, self.slice.value - 1, self.round.value

    @property
    def text(self):
        """What is looked at, in words."""
        slices = f", slice {self.slice.value} of {self.slice.max}" if self.slice.max > 1 else ""
        rounds = f", round {self.round.value}" if len(self.round.options) > 1 else ""
        return f"{self.case.value}{slices}{rounds}"

    def open_case(self, _=None):
        """Go to the middle slice of the case, as the outermost show little."""
        count = self.cases[self.case.value]
        with self.slice.hold_trait_notifications():  # one picture, not one of every step on the way
            self.slice.max, self.slice.value = count, (count + 1) // 2
        self.slice.layout.display = "none" if count == 1 else None
        self.draw()

    def draw(self, _=None):
        """Show what is chosen."""
        self.status.value = f"{self.text}: {self.layer.value} …"
        self.meaning.value = LAYERS.get(self.layer.value, "")
        try:
            self.picture.value = self.render(*self.chosen, self.layer.value, self.outlined.value)
            self.place.children = (self.picture,)
        except Exception:  # of any kind: the layers are the caller's
            self.error.value = f"<pre>{escape(format_exc())}</pre>"
            self.place.children = (self.error,)
        self.status.value = f"{self.text}: {self.layer.value}"

    def render(self, case, slice, number, layer, outlined, title=""):
        """The picture as PNG."""
        layers = self.layers(case, slice, number)
        names = [name for name in self.offered if name in layers] if layer == "all" else (layer,)
        figure = pictures(layers, names, self.classes, outlined, title)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()

    def save(self, file, number):
        """Write all layers of the slice that is chosen now, as they are in round ``number``, as PNG."""
        case, slice, _ = self.chosen
        title = f"{case}, round {number}" if len(self.round.options) > 1 else case
        Path(file).write_bytes(self.render(case, slice, number, "all", True, title))

    def show(self):
        """Display the widget, and below it the still picture: all layers of the slice that is chosen now.

        Raises:
            Whatever ``layers`` raises for that slice, after the widget is shown.
        """
        display(self.widget)
        display(Image(self.render(*self.chosen, "all", True, self.text)))


def pictures(layers, names, classes=(), outlined=True, title=""):
    """A figure of some layers of one slice, see Viewer: those with N pictures in rows of their own.

    Args:
        layers: dictionary of layer to array.
        names: of the layers to draw; one that is missing is drawn as the image and says so.
        outlined: whether the true mask's outline is drawn on the others.
    """
    single = [
        (name, layers.get(name), name if name in layers else f"no {name}")
        for name in names
        if name not in SETS or name not in layers
    ]
    rows = [single] if single else []
    for name in (name for name in names if name in SETS and name in layers):
        rows.append(
            [
                (name, value, f"{name[:-1] if name.endswith('s') else name}, {SETS[name]} {k + 1}")
                for k, value in enumerate(layers[name])
            ]
        )
    if len(rows) == 1 and len(single) != 1:  # one layer of N pictures
        rows = [rows[0][k : k + 3] for k in range(0, len(rows[0]), 3)]
    columns = max(map(len, rows))
    side = 5.4 if columns == 1 else 2.4
    heated = any(name in HEATS and name in layers for name in names)  # with a colour bar below
    figure = Figure(
        figsize=(side * columns, (side + 0.25) * len(rows) + 0.3 + 0.3 * heated + 0.3 * bool(title)),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(grid, rows):
        for axes in line[len(row) :]:
            axes.axis("off")
        for axes, (name, value, caption) in zip(line, row):
            panel(axes, layers, name, value, outlined)
            axes.set_aspect(layers.get("aspect", 1))
            axes.set_title(caption, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    legend(figure, layers, names, classes, outlined)
    return figure


def panel(axes, layers, name, value, outlined):
    """One picture of a layer; ``value`` is None where the layer is missing."""
    if name == "displacement" and value is not None:
        draw_grid(axes, value, spacing=max(1, round(max(array(value).shape) / 16)))
        return
    heat = None
    if name in HEATS and value is not None:
        colours, low, high = HEATS[name]
        heat = array(value)
        heat = np.clip((high - heat) / (high - low) if colours.endswith("_r") else heat, 0, 1)
        bar = axes.inset_axes((0, -0.07, 1, 0.04))
        axes.figure.colorbar(
            ScalarMappable(Normalize(low, high), colours),
            cax=bar,
            orientation="horizontal",
            ticks=np.linspace(low, high, 6),
        )
        bar.tick_params(labelsize=7)
        for label, side in zip(bar.get_xticklabels()[::5], ("left", "right")):  # no wider than the picture
            label.set_horizontalalignment(side)
    draw(axes, layers["image"], heat=heat)
    if value is not None and heat is None and name != "image":
        axes.imshow(tinted(value))
    if outlined and "true mask" in layers and name != "image":
        outline(axes, layers["true mask"])


def tinted(masks):
    """Masks ``(classes, height, width)`` in [0, 1] as an RGBA picture ``(height, width, 4)``, a colour a class."""
    masks = array(masks).astype(float)
    masks = masks[None] if masks.ndim == 2 else masks
    colours = np.array([to_rgb(COLOURS[k % len(COLOURS)]) for k in range(len(masks))])
    total = masks.sum(axis=0)
    mixed = np.einsum("khw,kc->hwc", masks, colours) / np.maximum(total, 1e-6)[..., None]
    return np.concatenate((np.clip(mixed, 0, 1), 0.6 * np.clip(total, 0, 1)[..., None]), axis=-1)


def legend(figure, layers, names, classes, outlined):
    """Colours of the classes, and that of the true mask's outline, where they are drawn."""
    handles = []
    if any(name in layers and name not in HEATS and name not in ("image", "displacement") for name in names):
        handles = [Patch(color=COLOURS[k % len(COLOURS)], alpha=0.6, label=name) for k, name in enumerate(classes)]
    if outlined and "true mask" in layers and any(name not in ("image", "displacement") for name in names):
        handles.append(Line2D([], [], color=TRUE, label="true mask"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def experiment_layers(experiment):
    """The layers of an experiment's images.

    Args:
        experiment: Experiment whose joint rounds are trained.

    Returns:
        Function of (index of an image in the cohort, round) that gives the dictionary that Viewer wants, on the CPU.
        Augmentations and sources are drawn alike in every round, so that rounds can be compared.
    """
    settings, data, numerics = experiment.settings, experiment.data, experiment.numerics

    @lru_cache(2)
    def load(number):
        networks, _ = load_round(experiment, number)
        return tuple(network.eval() for network in networks)

    def layers(index, number):
        networks = load(number)
        index = data.as_index([index])
        generator = numerics.generator(settings.seed, "viewer", int(index))
        seen, warped, fields = experiment.every_mask(networks, index, generator)
        means = seen.mean(0), warped.mean(0)
        soft = (means[0] + means[1]) / 2
        every = torch.cat((1 - soft.sum(dim=1, keepdim=True), soft), dim=1)
        found = {
            "image": data.images[index][0, 0],
            "prediction": harden(seen[0])[0],
            "confidence": every.amax(dim=1)[0].clamp(0, 1),
            "disagreement": (means[0] - means[1]).abs().amax(dim=1)[0],
            "segmentation masks": seen[:, 0],
            "warped masks": warped[:, 0],
            "displacement": fields[:, 0],
        }
        if data.known(index).all():
            found["true mask"] = data.masks[index[0]]
        return {name: value.float().cpu().numpy() for name, value in found.items()}

    return layers


def experiment_viewer(experiment, index):
    """A Viewer of the images ``index`` of an experiment, slices of one subject (of a volume, in order) in one case."""
    cohort = experiment.cohort
    names, roles = getattr(cohort, "volumes", cohort.subjects), cohort.split.astype(object)
    for role in ("labelled", "unlabelled"):
        roles[getattr(experiment.data, role).cpu().numpy()] = role
    members = {}
    for position in index.tolist():
        members.setdefault(f"{names[position]} ({roles[position]})", []).append(position)
    layers = experiment_layers(experiment)
    return Viewer(
        {name: len(positions) for name, positions in members.items()},
        lambda case, slice, number: layers(members[case][slice], number),
        finished_rounds(experiment),
        cohort.classes,
    )
