"""Pictures of slices, masks and displacement fields, and Figure 2."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import ConnectionPatch

from lib.losses import gncc
from lib.metrics import dice
from lib.warping import jacobian_determinant, warp

TRUE = "#2bd46f"  # outline of the true mask
OTHER = "#ffb000"  # outline of any other mask
CLASSES = ("#2bd46f", "#ff5ca8", "#3fb8ff", "#ffb000", "#c58cff", "#ff7043", "#f4f13a", "#9ccc65")  # of several classes


def array(tensor):
    """A tensor or array as a numpy array without its singleton axes."""
    tensor = tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
    return tensor.squeeze()


def outline(axes, mask, colour=TRUE, width=1.2, style="solid"):
    """The outline of every class of a mask ``(classes, height, width)`` or ``(height, width)``.

    Args:
        colour: of all classes, or a list of one for each, which begins anew where there are more classes.
    """
    mask = array(mask)
    for number, channel in enumerate(mask[None] if mask.ndim == 2 else mask):
        if channel.min() < 0.5 <= channel.max():
            own = colour if isinstance(colour, str) else colour[number % len(colour)]
            axes.contour(channel, [0.5], colors=own, linewidths=width, linestyles=style)


def heat_colours(heat):
    """RGBA of a heat map in [0, 1]; where nothing is marked the image under it stays visible."""
    colours = plt.get_cmap("inferno")(heat)
    colours[..., 3] = 0.8 * np.clip(heat / 0.25, 0, 1)
    return colours


def draw(axes, image, mask=None, title="", heat=None, colour=TRUE):
    """An image, optionally under a heat map in [0, 1] and with the outline of a mask."""
    axes.imshow(array(image), cmap="gray", vmin=0, vmax=1)
    if heat is not None:
        heat = array(heat)
        axes.imshow(heat_colours(heat.max(axis=0) if heat.ndim == 3 else heat))
    if mask is not None:
        outline(axes, mask, colour)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def through(masks, *others):
    """What pictures show of a batch: of volumes the slice in which most is marked; slices as they are.

    Args:
        masks: ``(n, classes, *space)``, by which the slice is chosen.
        others: ``(n, channels, *space)`` of the same space, cut alike.

    Returns:
        List of masks and others as ``(n, channels, height, width)`` tensors or arrays.
    """
    if masks.ndim == 4:
        return [masks, *others]
    chosen = array(masks).reshape(*masks.shape).sum(axis=(1, 3, 4)).argmax(axis=1)
    return [
        np.stack([array(volume[:, k]).reshape(-1, *volume.shape[2:]) for volume, k in zip(each, chosen)])
        for each in (masks, *others)
    ]


def gallery(images, masks, titles, columns=6, predicted=None):
    """Slices, or slices through volumes, with the outline of their masks, and of ``predicted`` ones, where given."""
    masks, images, *predicted = through(masks, images, *([] if predicted is None else [predicted]))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2 * columns, 2.5 * rows), squeeze=False)
    for ax in axes.flat[len(images) :]:
        ax.axis("off")
    for ax, image, mask, title in zip(axes.flat, images, masks, titles):
        draw(ax, image, mask, title)
    for found in predicted:
        for ax, mask in zip(axes.flat, found):
            outline(ax, mask, OTHER)
    figure.tight_layout()
    return figure


def neighbours(images, truth, masks, found, rows, columns=5):
    """Unlabelled images, one in a row, and the neighbours that are registered to each.

    Args:
        images, truth: ``(pool, channels, *space)`` and ``(pool, classes, *space)``, the unlabelled images first.
        masks: ``(pool, classes, *space)``, which the neighbours hand on.
        found: methods.peers.neighbours.Neighbours.
        rows: positions of the images to show.
        columns: how many neighbours are shown of each.
    """
    pictures, outlines, predicted, titles = [], [], [], []
    for row in rows:
        at = truth[row].sum(dim=(0, -1, -2)).argmax() if truth.ndim == 5 else None
        cut = lambda image, at=at: image if at is None else image[:, at]  # a slice of a volume
        nothing = torch.zeros_like(cut(truth[row]))
        pictures.append(cut(images[row, :1]))
        outlines.append(cut(truth[row]))
        predicted.append(nothing)
        titles.append("unlabelled")
        for k in range(min(columns, found.sources.shape[1])):
            source, field = found.sources[row, k, None], found.fields[row, k, None].float()
            mask = warp(masks[source], field)[0]
            marked = mask.amax(0) > 0.5
            weight = float(found.weights[row, k][marked].mean()) if marked.any() else 0.0
            pictures.append(cut(warp(images[source, :1], field)[0]))
            outlines.append(nothing)
            predicted.append(cut(mask))
            titles.append(f"weight {weight:.2f}")
    pictures, outlines, predicted = (torch.stack(part) for part in (pictures, outlines, predicted))
    return gallery(pictures, outlines, titles, columns=len(titles) // len(rows), predicted=predicted)


def draw_grid(axes, displacement, spacing=4):
    """A regular grid on the target, drawn where the displacement field takes it on the source."""
    displacement = array(displacement)
    height, width = displacement.shape[-2:]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    rows, columns = rows + displacement[0], columns + displacement[1]
    axes.plot(columns[::spacing].T, rows[::spacing].T, color="#1f77b4", linewidth=0.6)
    axes.plot(columns[:, ::spacing], rows[:, ::spacing], color="#1f77b4", linewidth=0.6)
    axes.set(xlim=(-1, width), ylim=(height, -1), aspect="equal", xticks=[], yticks=[])


def registrations(source, target, source_mask, target_mask, fields):
    """How one image is registered to another by one or several fields.

    Args:
        source, target: ``(1, 1, height, width)``; source_mask, target_mask: ``(1, classes, height, width)``.
        fields: dictionary of a row's label to a displacement field ``(1, 2, height, width)``.

    One row per field: source, target, warped source, warped grid, Jacobian determinant with folds marked.
    """
    figure, axes = plt.subplots(len(fields), 5, figsize=(15, 3.4 * len(fields)), squeeze=False)
    for line, (name, field) in zip(axes, fields.items()):
        warped, warped_mask = warp(source, field), warp(source_mask, field)
        scores = f"DSC {dice(warped_mask, target_mask).mean():.3f}, GNCC {gncc(warped, target).item():.3f}"
        draw(line[0], source, array(source_mask), "source and its mask", colour=OTHER)
        draw(line[1], target, array(target_mask), "target (true mask, not used)")
        draw(line[2], warped, array(warped_mask), f"warped source, warped mask\n{scores}", colour=OTHER)
        outline(line[2], array(target_mask))
        draw_grid(line[3], field)
        line[3].set_title("displacement field", fontsize=9)
        determinant = array(jacobian_determinant(field))
        shown = line[4].imshow(determinant, cmap="RdBu", vmin=0, vmax=2)
        line[4].imshow(np.where(determinant[..., None] <= 0, to_rgba("black"), to_rgba("none")))
        line[4].set_title(f"Jacobian determinant; folding {100 * (determinant <= 0).mean():.2f} %", fontsize=9)
        line[4].set(xticks=[], yticks=[])
        figure.colorbar(shown, ax=line[4], fraction=0.046)
        line[0].set_ylabel(name, fontsize=9)
    figure.tight_layout()
    return figure


def mask_set(image, truth, segmentation, registration, soft):
    """The 2N masks of one image and their mean, as heat maps with the true outline.

    Args:
        segmentation, registration: ``(n, classes, height, width)``.
        soft: ``(classes, height, width)``.
    """
    n = len(segmentation)
    figure, axes = plt.subplots(2, n + 1, figsize=(2 * (n + 1), 4.4))
    for k in range(n):
        draw(axes[0, k], image, truth, "segmentation, plain" if k == 0 else f"augmented {k}", segmentation[k])
        draw(axes[1, k], image, truth, f"warped from source {k + 1}", registration[k])
    draw(axes[0, n], image, truth, "soft pseudo-mask", soft)
    draw(axes[1, n], image, truth, "image and true mask")
    figure.tight_layout()
    return figure


def cases(experiment, masks, per_image, columns=6):
    """For every method the test images with its best, median and worst DSC, around the structure.

    One class: the true outline is green, the method's orange. Several: each has a colour, the true outline is solid
    and the method's dashed.

    Args:
        experiment: Experiment.
        masks: dictionary of method to its masks of the test images.
        per_image: rows of class ``mean``.
    """
    cohort, data = experiment.cohort, experiment.data
    index, several = cohort.index("test"), len(cohort.classes) > 1
    blocks = -(-len(masks) // columns)
    columns = -(-len(masks) // blocks)
    figure, axes = plt.subplots(3 * blocks, columns, figsize=(1.9 * columns, 7.4 * blocks), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for number, (method, predicted) in enumerate(masks.items()):
        rows = per_image[
            (per_image["method"] == method)
            & per_image["slice"].isin(index)
            & per_image["recipe"].isin((experiment.settings.recipe, "-"))
        ].sort_values("dsc")
        block, column = divmod(number, columns)
        places = ("best", -1), ("median", len(rows) // 2), ("worst", 0)
        for ax, (name, position) in zip(axes[3 * block : 3 * block + 3, column], places):
            row = rows.iloc[position]
            at = int(np.flatnonzero(index == row["slice"])[0])
            if hasattr(cohort, "volumes"):  # rows are of whole volumes: show the middle slice
                same = np.flatnonzero(cohort.volumes[index] == cohort.volumes[row["slice"]])
                at = int(same[len(same) // 2])
            at, where = slice(at, at + 1), index[at : at + 1]
            truth, found, image = map(array, through(data.masks[where], predicted[at], data.images[where]))
            truth, found = (mask.reshape(-1, *image.shape) for mask in (truth, found))
            ax.axis("on")
            draw(
                ax,
                image,
                truth,
                f"{method}, {name}\nDSC {row['dsc']:.3f}, HD {row['hd']:.1f}",
                colour=CLASSES if several else TRUE,
            )
            outline(ax, found, CLASSES if several else OTHER, style="dashed" if several else "solid")
            zoom(ax, np.concatenate((truth, found)) >= 0.5)
    if several:
        lines = [plt.Line2D([], [], color=colour, label=name) for colour, name in zip(CLASSES, cohort.classes)]
        lines += [
            plt.Line2D([], [], color="black", label="true"),
            plt.Line2D([], [], color="black", linestyle="dashed", label="the method's"),
        ]
        figure.legend(handles=lines, loc="lower center", ncols=len(lines), fontsize=9)
    figure.tight_layout(rect=(0, 0.03 * several, 1, 1))
    return figure


def zoom(axes, masks, margin=0.3):
    """Show the square around masks ``(n, height, width)`` of an image that is drawn already; all if they are empty."""
    marked = np.argwhere(masks.any(axis=0))
    if not len(marked):
        return
    low, high = marked.min(axis=0), marked.max(axis=0)
    row, column = (low + high) / 2
    reach = (0.5 + margin) * (high - low).max() + 2
    axes.set(xlim=(column - reach, column + reach), ylim=(row + reach, row - reach), facecolor="black")


def around(truth, margin=0.75):
    """The window around a mask ``(classes, height, width)``, with a margin in sizes of it, as slices."""
    marked = np.argwhere(truth.reshape(-1, *truth.shape[-2:]).any(axis=0))
    low, high = marked.min(axis=0), marked.max(axis=0)
    room = int(margin * (high - low).max()) + 2
    return tuple(slice(max(0, a - room), b + room + 1) for a, b in zip(low, high))


def over_time(image, truth, watched, columns=5):
    """Masks of one image at several steps of a training.

    Args:
        watched: dictionary of the row's label to pairs of step and mask, as Fit.watched.
    """
    rows = [
        (label, [pairs[round(k)] for k in np.linspace(0, len(pairs) - 1, min(columns, len(pairs)))])
        for label, pairs in watched.items()
    ]
    width = max(len(chosen) for _, chosen in rows)
    figure, axes = plt.subplots(len(rows), width, figsize=(2 * width, 2.3 * len(rows)), squeeze=False)
    window = around(array(truth))
    for line, (label, chosen) in zip(axes, rows):
        for ax, (step, mask) in zip(line, chosen):
            draw(ax, array(image)[window], array(truth)[(..., *window)], f"step {step}", array(mask)[(..., *window)])
        line[0].set_ylabel(label, fontsize=9)
    figure.tight_layout()
    return figure


def correspondences(source, target, source_mask, target_mask, field, count=8):
    """Pixels of an unlabelled image and the anatomically corresponding ones of the labelled image.

    Args:
        source, target: ``(1, 1, height, width)``, the labelled and the unlabelled image.
        source_mask, target_mask: ``(1, classes, height, width)``, drawn as outlines.
        field: ``(1, 2, height, width)``.
        count: pixels to show, of the warped mask, evenly spaced in the order of their angle about its centre.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.2))
    draw(left, target, array(target_mask), "unlabelled image: anchors\n(true mask, not used)")
    draw(right, source, array(source_mask), "labelled image: their positives", colour=OTHER)
    warped = array(warp(source_mask, field)).reshape(-1, *array(field).shape[-2:]).max(axis=0)
    marked = np.argwhere(warped >= 0.5)
    if len(marked):
        angle = np.arctan2(*(marked - marked.mean(axis=0)).T)
        marked = marked[np.argsort(angle)][np.linspace(0, len(marked) - 1, min(count, len(marked))).astype(int)]
    for number, (row, column) in enumerate(marked):
        to_row, to_column = array(field)[:, row, column] + (row, column)
        colour = plt.get_cmap("tab10")(number % 10)
        left.plot(column, row, "o", color=colour, markersize=5)
        right.plot(to_column, to_row, "o", color=colour, markersize=5)
        figure.add_artist(
            ConnectionPatch(
                (column, row), (to_column, to_row), "data", "data", axesA=left, axesB=right, color=colour, linewidth=0.8
            )
        )
    return figure


def figure2(image, truth, blocks, teachers=None):
    """Figure 2 of P1: how the pseudo-masks of one unlabelled training image change over the rounds.

    Args:
        image: ``(height, width)``.
        truth: ``(classes, height, width)``, drawn as outline.
        blocks: dictionary of recipe to a list of PseudoMasks of this image, one per round, round 0 first.
        teachers: dictionary of label to (steps, masks), further rows.
    """
    image, truth = array(image), array(truth)
    window = around(truth, 0.3)
    rows = []
    for recipe, rounds in blocks.items():
        for name in ("segmentation", "registration", "soft"):
            label = f"{recipe} recipe\n{'soft pseudo-mask' if name == 'soft' else name}"
            rows.append((label, [(f"iteration {k}", getattr(masks, name)) for k, masks in enumerate(rounds)]))
    for label, (steps, masks) in (teachers or {}).items():
        rows.append((label, [(f"step {step}", mask) for step, mask in zip(steps, masks)]))
    columns = max(len(cells) for _, cells in rows)
    shape = image[window].shape
    high = 0.35 + 1.6 * shape[0] / shape[1]
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.7 * columns + 1.2, high * len(rows)), squeeze=False)
    for line, (label, cells) in zip(axes, rows):
        for ax in line[len(cells) :]:
            ax.axis("off")
        for ax, (title, mask) in zip(line, cells):
            draw(ax, image[window], truth[(..., *window)], title, array(mask)[(..., *window)])
        line[0].set_ylabel(label, fontsize=8)
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    box = axes[0, -1].get_position()
    bar = figure.add_axes((0.945, box.y0, 0.012, box.height))
    bar.set_facecolor("0.5")  # as an image of middle grey would look
    bar.imshow(heat_colours(np.linspace(0, 1, 256)[:, None]), origin="lower", aspect="auto", extent=(0, 1, 0, 1))
    bar.set(xticks=[], ylabel="pseudo-mask")
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    return figure
