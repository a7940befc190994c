"""The table of methods: all that tables, figures and the grid know of them.

A new method is a module here (``train_...`` for its notebook, ``predict`` for the evaluation), a notebook that trains
it, a section of params.yaml and its entries below. The table is a module of its own that no training imports: a new
entry repeats no training. It needs no torch, so that tables and charts start quickly.
"""

from collections.abc import Callable
from typing import NamedTuple

from lib.runs import versions

FAIR = "12_fair"  # the notebook in which recipe `fair` trains


class Stage(NamedTuple):
    """Something that is trained (or, as classical registration, only run), and gives one mask or several.

    Its module under lib.methods has ``predict(experiment, index)``: a dictionary of method to experiment.Prediction of
    the images ``index``. If there is a course to show, it also has ``rounds(experiment)``: its rows of rounds.csv.
    """

    name: str  # the folder of its weights, and its section of params.yaml
    module: str  # under lib.methods
    notebook: str  # that trains it; of an untrained one the notebook that runs it
    after: tuple = ()  # stages that it goes on from; their costs are its own too
    rounds: bool = False  # trained in rounds; all are kept
    peer: str = ""  # its module under lib.methods.peers, whose ``train`` trains it in recipe `fair`
    needs_unlabelled: bool = True  # it does not run if everything is labelled
    trained: bool = True
    runs: Callable = lambda settings, recipe: True  # whether it runs, for the pipeline's settings and a recipe
    sections: tuple = ()  # of params.yaml, or parts of them, that only it and others that name them read
    varied_by: tuple = ()  # sections whose change makes a variant of it
    version: str = ""  # of its code, see runs.versions
    variants_in_table1: bool = False
    watched: str = ""  # how Figure 2 calls the masks that it gives while it learns


SEGMENTATION = Stage(
    "segmentation", "pretraining", "02_pretrain_segmentation", peer="supervised", needs_unlabelled=False
)
REGISTRATION = Stage("registration", "pretraining", "03_pretrain_registration")
MEAN_TEACHER = Stage("mean_teacher", "mean_teacher", "05_mean_teacher", peer="consistency", watched="MT")
JOINT = Stage(
    "joint",
    "joint",
    "04_joint_training",
    after=("segmentation", "registration"),
    rounds=True,
    runs=lambda settings, recipe: recipe != "fair",
)
JOINT_PLUS = Stage(
    "joint_plus",
    "joint_plus",
    "06_joint_plus",
    after=("segmentation", "registration"),
    rounds=True,
    runs=lambda settings, recipe: recipe == settings.recipe != "fair",
    sections=("joint_plus",),
    varied_by=("joint_plus", "coverage"),
    version=versions.JOINT_PLUS,
)
CCTR = Stage(
    "cctr",
    "cctr.train",
    "07_cctr",
    after=("registration",),
    runs=lambda settings, recipe: recipe in settings.cctr.recipes,
    sections=("cctr", "joint_plus.refinement"),
    varied_by=("cctr",),
    version=versions.CCTR,
    variants_in_table1=True,
)


def peer(name, registered=False, needs_unlabelled=True):
    """A stage of recipe `fair` alone: its module under methods.peers trains it and predicts.

    Args:
        registered: whether it needs the pre-trained registration.
    """
    after = (REGISTRATION.name,) if registered else ()
    return Stage(
        name,
        f"peers.{name}",
        FAIR,
        after=after,
        peer=name,
        needs_unlabelled=needs_unlabelled,
        runs=lambda settings, recipe: recipe == "fair",
    )


CLASSICAL = Stage("classical", "classical", "08_evaluation", trained=False)


class Method(NamedTuple):
    """A mask that is tested: a row of Table 1 and a line in the figures."""

    name: str
    stage: Stage
    colour: str  # in all figures
    about: str  # what is tested, in a sentence
    compared_with: tuple = ()  # methods, besides the baseline
    companion: str = ""  # of the method that the ablation is of: what its stage gives besides
    width: float = 1.5  # of its line
    in_reliability: bool = False  # shown in the reliability diagram


METHODS = (
    Method(
        "fs",
        SEGMENTATION,
        "#7f7f7f",
        "the segmentation network trained on the labelled images alone: the baseline",
        width=4,
        in_reliability=True,
    ),  # broad, to be seen where joint, whose best round may be fs, lies upon it
    Method("mt", MEAN_TEACHER, "#e6a100", "the teacher of Mean Teacher, P1's semi-supervised baseline"),
    Method("registration", JOINT, "#7fb2e5", "the mean of the N warped masks"),
    Method("joint", JOINT, "#f08a84", "the segmentation network after P1's joint training", in_reliability=True),
    Method(
        "combined",
        JOINT,
        "#bfa3dd",
        "the mean of all 2N masks of the test image, P1's confidence map",
        ("mt",),
        in_reliability=True,
    ),
    Method("registration+", JOINT_PLUS, "#1f77b4", "the mean of the N warped masks of joint+, their fields refined"),
    Method(
        "joint+",
        JOINT_PLUS,
        "#d62728",
        "the segmentation network after joint+",
        companion="combined+",
        in_reliability=True,
    ),
    Method(
        "combined+",
        JOINT_PLUS,
        "#7b3fb5",
        "the weighted mean of the 2N masks of joint+",
        ("mt", "joint+", "registration+"),
        in_reliability=True,
    ),
    Method(
        "cctr",
        CCTR,
        "#8c564b",
        "the U-Net of CCT-R",
        ("mt", "joint", "combined", "joint+", "cctr-b"),
        companion="cctr-b",
    ),
    Method("cctr-b", CCTR, "#c49c94", "the Swin transformer of CCT-R"),
    Method(
        "classical",
        CLASSICAL,
        "#2ca02c",
        "labelled images registered by SimpleITK (affine, then diffeomorphic Demons), no training",
    ),
    Method("fs+elastic", peer("elastic", needs_unlabelled=False), "#404040", "the baseline with elastic augmentation"),
    Method("bcp", peer("bcp"), "#17becf", "bidirectional copy-paste (Bai et al., CVPR 2023)"),
    Method("unimatch", peer("unimatch"), "#bcbd22", "UniMatch (Yang et al., CVPR 2023)"),
    Method("self-training", peer("self_training"), "#aec7e8", "self-training, noisy student (Xie et al., CVPR 2020)"),
    Method("brainstorm", peer("brainstorm", True), "#98df8a", "pairs by registration alone (Zhao et al., CVPR 2019)"),
    Method("joint+ (one stage)", peer("one_stage", True), "#e377c2", "copy-paste of images warped onto their target"),
)
BASELINE = METHODS[0]


def by_name():
    """Dictionary of name to Method, in the order of the table."""
    return {method.name: method for method in METHODS}


def stages(trained=True):
    """Stages whose masks are tested, in the order of the table."""
    found = dict.fromkeys(method.stage for method in METHODS)
    return [stage for stage in found if stage.trained == trained]


def stages_of(settings, recipe, rate=None, changed=()):
    """Stages that run for a recipe and a rate, in the order in which they are trained (that of their notebooks).

    Args:
        settings: of the pipeline.
        rate: per cent; at 100 nothing is unlabelled.
        changed: sections that a variant changes. Only stages that vary by them are trained, after the pre-training
            that they share. Empty: no variant.
    """
    every = sorted({REGISTRATION, *stages()}, key=lambda stage: stage.notebook)
    if changed:
        return [REGISTRATION, SEGMENTATION, *(stage for stage in every if set(stage.varied_by) & set(changed))]
    return [stage for stage in every if stage.runs(settings, recipe) and not (rate == 100 and stage.needs_unlabelled)]
