"""Labelled images registered to unlabelled ones, once: what brainstorm and joint+ train on."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from lib.augment import elastic
from lib.losses import gncc
from lib.methods.experiment import load_pretrained_registration
from lib.methods.peers.learning import SEEDS
from lib.refinement import Refined
from lib.runs.cabinet import PAIRS
from lib.runs.versions import fingerprint
from lib.training import Clock, draw_indices, weights_digest
from lib.warping import warp


class Fields(NamedTuple):
    """For every unlabelled image the labelled images that fit it best, each with the field that warps it there."""

    sources: torch.Tensor  # (n, k) positions among the labelled images, the most similar first
    fields: torch.Tensor  # (n, k, axes, *space), in pixels
    cause: str = ""  # fingerprint of what they were made from and how

    def draw(self, count, generator):
        """``count`` unlabelled images, each with one of its sources: positions, sources and fields."""
        index = draw_indices(len(self.sources), count, generator)
        which = torch.randint(self.sources.shape[1], (count,), generator=generator, device=index.device)
        return index, self.sources[index, which], self.fields[index, which]

    def random(self, generator, points):
        """The same pairs with smooth random fields, each of the strength of the registered one: no registration at all.

        Args:
            points: see augment.elastic.
        """
        flat = self.fields.flatten(0, 1)
        drawn = elastic(len(flat), flat.shape[2:], generator, points, 1.0)
        strength = lambda field: field.square().mean(dim=tuple(range(1, field.ndim)), keepdim=True).sqrt()
        return self._replace(fields=(drawn * strength(flat) / strength(drawn)).reshape(self.fields.shape))

    def shuffled(self):
        """Every unlabelled image with the sources and fields of another one: real anatomy, but not its own."""
        return self._replace(sources=self.sources.roll(1, 0), fields=self.fields.roll(1, 0))


@torch.no_grad()
def register_pairs(experiment):
    """Register labelled images to all unlabelled ones, and refine every field for its pair.

    For every unlabelled image ``strong.pairs.candidates`` labelled ones are tried. The ``kept`` most similar ones after
    registration (GNCC) stay. No mask is looked at. Setting ``control`` puts random or shuffled fields in their place.

    Returns:
        Fields.
    """
    data, numerics, options = experiment.data, experiment.numerics, experiment.settings.strong.pairs
    pretrained, refinement = load_pretrained_registration(experiment), experiment.settings.refinement
    cause = fingerprint(weights_digest(pretrained), refinement, options, data.labelled.tolist())
    network = Refined(pretrained, refinement).eval()
    generator = numerics.generator(experiment.settings.seed, *SEEDS, "pairs")
    count = min(options.candidates, len(data.labelled))
    tried = experiment.draw_sources(data.unlabelled, count, generator)
    size, sources, fields, clock = numerics.batch(data.guides), [], [], Clock(numerics.device)
    for targets, chosen in tqdm(list(zip(data.unlabelled.split(size), tried.split(size))), desc="pairs", unit="batch"):
        target, found, similar = data.guides[targets], [], []
        for candidate in chosen.T:
            source = data.guides[data.labelled[candidate]]
            with numerics.autocast():
                field = network.register(source, target)
            found.append(field)
            similar.append(gncc(warp(source, field), target))
        best = torch.stack(similar, 1).argsort(1, descending=True)[:, : options.kept]
        sources.append(chosen.gather(1, best))
        fields.append(torch.stack(found, 1)[torch.arange(len(best), device=best.device)[:, None], best])
    experiment.note_cost(PAIRS, clock.read())
    found = Fields(torch.cat(sources), torch.cat(fields), cause)
    if options.control == "random":
        return found.random(generator, experiment.settings.strong.augmentation.elastic.points)
    return found.shuffled() if options.control == "shuffled" else found


def draw_pairs(lesson, fields, count, generator):
    """``count`` unlabelled images and labelled ones warped onto them, moved alike and each lit anew.

    Returns:
        (unlabelled images, warped images, warped masks).
    """
    index, sources, chosen = fields.draw(count, generator)
    channels = lesson.labelled.shape[1]
    warped = warp(torch.cat((lesson.labelled[sources], lesson.masks[sources]), 1), chosen)
    both = torch.cat((lesson.unlabelled[index], warped[:, :channels]), 1)
    images, masks = lesson.move(both, warped[:, channels:], generator)
    return *(lesson.light(part, generator) for part in images.split(channels, dim=1)), masks
