"""Settings of a run: params.yaml, resolved for one scale and one recipe, and the folders that go with them."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

from ruamel.yaml import YAML, YAMLError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("paper", "strong")
SELECTIONS = ("none", "validation", "training")
VOLUME_COHORTS = ("acdc", "synapse")  # their images are slices of volumes, see cohorts.volumes
CHOICES = {
    "cohort": ("midbrain", "hippocampus", "hippocampus_centre", "hippocampus3d", *VOLUME_COHORTS, "folder"),
    "recipe": RECIPES,
    "scale": ("smoke", "cpu", "paper"),
    "precision": ("auto", "bfloat16", "float32"),
}
OWN_METHODS = ("auto", "fs+elastic", "bcp", "joint+")  # that may segment a user's own scans
CONTROLS = ("none", "random", "unmoved", "forced", "teacher")  # of joint+, see neighbours.find_neighbours
SPACES = ("auto", "slices", "volumes", "views")  # how they are seen
SMALLEST = 16  # pixels, the side of slices in which there is anything to see after four halvings
MIXED = ("slices", "drawn")  # settings that may be a word, or a list or a number


class Section(dict):
    """A part of params.yaml whose keys read as attributes."""

    def __getattr__(self, key):
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"params.yaml has no '{key}' here; it has {', '.join(self)}") from None


def section(tree):
    """Nested dictionaries as nested Sections, ruamel's types as plain ones."""
    if isinstance(tree, dict):
        return Section((key, section(value)) for key, value in tree.items())
    if isinstance(tree, list):
        return [section(value) for value in tree]
    if isinstance(tree, bool) or tree is None:
        return tree
    if isinstance(tree, int):
        return int(tree)
    return float(tree) if isinstance(tree, float) else str(tree)


def parse(text):
    """A value as params.yaml would have it: number, word, list or dictionary. What is no YAML is a word."""
    try:
        return section(YAML(typ="safe").load(text))
    except YAMLError:  # such as {case}_seg, which reads like the beginning of a dictionary
        return text


def same_kind(value, default):
    """Whether ``value`` may stand where ``default`` does: a number for a number, a list for a list, and so on."""
    kinds = bool, (int, float), str, list, dict
    kind = lambda each: next((number for number, types in enumerate(kinds) if isinstance(each, types)), None)
    return default is None or kind(value) == kind(default)


def merge(base, changes, where="params.yaml", new_keys=False):
    """``base`` with the values of ``changes``, recursively. Unknown keys are errors unless ``new_keys``."""
    merged = Section(base)
    for key, value in changes.items():
        if key not in base and not new_keys:
            raise ValueError(f"'{key}' is not a setting of {where}, which has {', '.join(base)}")
        if not new_keys and key not in MIXED and not same_kind(value, base[key]):
            raise ValueError(f"{key} '{value}' is not of the kind that {where} has: {key}: {json.dumps(base[key])}")
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value, f"{where}: {key}", new_keys) if both else value
    return merged


def load(recipe=None, cohort=None, rate=None, seed=None, variant=None, changes=()):
    """The settings of params.yaml, resolved.

    Args:
        recipe: ``paper`` or ``strong``; None for ``strong``.
        cohort: one of CHOICES; None for the one that the file names.
        rate, seed: None for those that the file names.
        variant: one of the file's ``variants``; None for the settings as they stand.
        changes: ``key=value`` or ``section.key=value``, each for one value of the file.

    The environment variable ``JOINT_SET`` (``key=value,section.key=value``) overrides single values and
    ``JOINT_OUTPUT`` names a folder for all outputs instead of the repository: the tests use both.

    Returns:
        Section. ``segmentation`` and ``registration`` hold the values of the recipe and the scale; what a variant
        changes holds its values, and ``varied`` names the sections that it changes. ``selection`` is how weights are
        chosen: by validation images in the paper's recipe, see section ``strong`` for the other.

    Raises:
        ValueError: an unknown cohort, recipe, scale, variant or setting, or a value of another kind than it should be.
    """
    tree = section(YAML(typ="safe").load((ROOT / "params.yaml").read_text()))
    for assignment in [*filter(None, os.environ.get("JOINT_SET", "").split(",")), *changes]:
        if "=" not in assignment:
            raise ValueError(f"'{assignment}' does not set anything: write key=value")
        *path, key = assignment.split("=", 1)[0].split(".")
        value = parse(assignment.split("=", 1)[1])
        nested = {key: value}
        for name in reversed(path):
            nested = {name: nested}
        tree = merge(tree, nested)
    chosen = {"recipe": recipe or "strong", "cohort": cohort, "rate": rate, "seed": seed}
    tree.update({key: value for key, value in chosen.items() if value is not None})
    for key, allowed in CHOICES.items():
        if tree[key] not in allowed:
            raise ValueError(f"{key} '{tree[key]}' in params.yaml is not one of {', '.join(allowed)}")
    for key in ("rate", "seed", "split_seed"):
        if not same_kind(tree[key], 1):
            raise ValueError(f"{key} '{tree[key]}' in params.yaml is not a number")
    if tree.rate == 100 and rate is None:
        raise ValueError(
            "rate 100 in params.yaml leaves nothing unlabelled: put it under grid.rates, where fs alone runs"
        )
    if not 0 < tree.rate <= 100:
        raise ValueError(f"rate {tree.rate} in params.yaml is not a percentage between 0 and 100")
    if tree.folder.axis not in (0, 1, 2):
        raise ValueError(f"folder.axis {tree.folder.axis} in params.yaml is not one of 0, 1, 2")
    if tree.folder.space not in SPACES:
        raise ValueError(f"folder.space '{tree.folder.space}' in params.yaml is not one of {', '.join(SPACES)}")
    if tree.folder.method not in OWN_METHODS:
        raise ValueError(f"folder.method '{tree.folder.method}' in params.yaml is not one of {', '.join(OWN_METHODS)}")
    if tree.folder.size < SMALLEST:
        raise ValueError(f"folder.size {tree.folder.size} in params.yaml is less than {SMALLEST} pixels")
    for name, budget in tree.pop("scales")[tree.scale].items():
        tree[name] = merge(tree.get(name, {}), budget, new_keys=True)
        by_recipe = {recipe: tree[name].pop(recipe, {}) for recipe in RECIPES}
        tree[name].update(by_recipe[tree.recipe])
    if tree.strong.joint_plus.control not in CONTROLS:
        raise ValueError(
            f"strong.joint_plus.control '{tree.strong.joint_plus.control}' in params.yaml is not one of "
            f"{', '.join(CONTROLS)}"
        )
    by_cohort = {name: tree.strong.pop(name, {}) for name in CHOICES["cohort"]}
    tree["strong"] = merge(tree.strong, by_cohort[tree.cohort], "params.yaml: strong")
    variants = tree.pop("variants")
    tree["variant"], tree["varied"] = variant or "", []
    if variant:
        if variant not in variants:
            raise ValueError(f"variant '{variant}' is not one of {', '.join(variants)} in params.yaml")
        tree = merge(tree, variants[variant])
        tree["varied"] = list(variants[variant])
    if tree.strong.selection not in SELECTIONS:
        raise ValueError(f"strong.selection '{tree.strong.selection}' is not one of {', '.join(SELECTIONS)}")
    tree["selection"] = tree.strong.selection if tree.recipe == "strong" else "validation"
    if set(tree.cctr.recipes) - {"strong"}:
        raise ValueError(
            "cctr.recipes in params.yaml may name strong alone: what is to be had of P2's text gives neither "
            "optimiser nor schedule nor augmentation for a recipe `paper`"
        )
    return tree


def use_folder(settings, **given):
    """Where a user's own images, masks, output and model are: as given, else as section ``folder`` says.

    Args:
        settings: as ``load`` gives them; changed in place, so that all paths are absolute.
        given: paths relative to the working folder; those of params.yaml are relative to the repository.
    """
    for name in ("images", "masks", "output", "model"):
        path = Path.cwd() / given[name] if given.get(name) else settings.folder[name] and ROOT / settings.folder[name]
        settings.folder[name] = str(path)


def output_root():
    """The folder under which work/ and results/ lie: the repository, unless JOINT_OUTPUT names another."""
    return Path(os.environ.get("JOINT_OUTPUT", ROOT))


@contextmanager
def outputs_under(folder):
    """Context in which ``output_root`` is ``folder``."""
    before = os.environ.get("JOINT_OUTPUT")
    os.environ["JOINT_OUTPUT"] = str(Path(folder).resolve())
    try:
        yield
    finally:
        os.environ.pop("JOINT_OUTPUT")
        if before is not None:
            os.environ["JOINT_OUTPUT"] = before


def work_folder(*names):
    """A folder under work/ for large files that git does not keep."""
    return output_root().joinpath("work", *map(str, names))


def cohort_file(settings):
    """Where notebooks/01_data.ipynb writes the cohort."""
    return work_folder("cohort", f"{settings.cohort}.npz")


def results_folder(settings):
    """results/<cohort>/, made if need be, for tables and figures that git keeps."""
    folder = output_root() / "results" / settings.cohort
    folder.mkdir(parents=True, exist_ok=True)
    return folder
