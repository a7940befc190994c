"""The table of methods: all that tables, figures and the grid know of them.

A new method is a module here (``train_...`` for its notebook, ``predict`` for the evaluation), a notebook that trains
it, its settings in params.yaml and its entries below. The table is a module of its own that no training imports: a new
entry repeats no training. It needs no torch, so that tables and charts start quickly.
"""

from typing import NamedTuple

from lib.runs import versions

COURSE = "course.csv"  # what methods.watching notes of an item of the contest; and of a cohort
COURSE_COLUMNS = ["method", "n_labelled", "seed", "step", "images_seen", "minutes", "dsc"]
PEERS = "12_peers"  # the notebook in which most methods of recipe `strong` are trained


class Stage(NamedTuple):
    """Something that is trained (or, as classical registration, only run), and gives one mask or several.

    Its module has ``predict(experiment, index)``: a dictionary of method to experiment.Prediction of the images
    ``index``. If there is a course to show, it also has ``rounds(experiment)``: its rows of rounds.csv.
    """

    name: str  # the folder of its weights, and its section of params.yaml or of `strong` there
    module: str  # under lib.methods; in recipe `strong` that of its peer, where it has one
    notebook: str  # that trains it by the paper's recipe; of an untrained one the notebook that runs it
    after: tuple = ()  # what it goes on from; the costs of these are its own too
    rounds: bool = False  # trained in rounds by the paper's recipe; all are kept
    peer: str = ""  # its module under lib.methods.peers, whose ``train`` trains it in recipe `strong`
    needs_unlabelled: bool = True  # it does not run if everything is labelled
    trained: bool = True
    recipes: tuple = ("paper", "strong")  # in which it runs; one of none is an item of the contest alone
    sections: tuple = ()  # of params.yaml that it reads in recipe `strong`, besides its part of `strong`
    parts: tuple = ()  # of section `strong` that it reads, besides the one of its name
    version: str = ""  # of its code, see runs.versions
    watched: str = ""  # how Figure 2 calls the masks that it gives while it learns

    def module_in(self, recipe):
        """Its module under lib.methods."""
        return f"peers.{self.peer}" if recipe == "strong" and self.peer else self.module

    def notebook_in(self, recipe):
        """The notebook that trains it."""
        return PEERS if recipe == "strong" and self.peer and self.notebook != OURS else self.notebook

    def needs(self, recipe):
        """What it goes on from. In recipe `strong` no segmentation network goes on from another's."""
        return tuple(name for name in self.after if recipe == "paper" or name != SEGMENTATION.name)


OURS = "06_joint_plus"
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
    peer="rounds",
    sections=("pseudo_masks",),
)
CCTR = Stage(
    "cctr",
    "cctr.train",
    "07_cctr",
    after=("registration",),
    recipes=("strong",),
    sections=("cctr", "refinement"),
    version=versions.CCTR,
)


def peer(name, *after, notebook=PEERS, needs_unlabelled=True, parts=(), sections=()):
    """A stage of recipe `strong` alone: its module under methods.peers trains it and predicts."""
    return Stage(
        name,
        f"peers.{name}",
        notebook,
        after,
        peer=name,
        needs_unlabelled=needs_unlabelled,
        recipes=("strong",),
        parts=parts,
        sections=sections,
    )


CLASSICAL = Stage(
    "classical",
    "classical",
    "08_evaluation",
    trained=False,
    sections=("classical", "pseudo_masks"),
)
ANTS = Stage("ants", "ants", "08_evaluation", trained=False, recipes=(), sections=("pseudo_masks",))


class Method(NamedTuple):
    """A mask that is tested: a row of Table 1 and a line in the figures."""

    name: str
    stage: Stage
    colour: str  # in all figures
    about: str  # what is tested, in a sentence
    compared_with: tuple = ()  # methods, besides the baseline
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
    Method("fs+elastic", peer("elastic", needs_unlabelled=False), "#404040", "the baseline with elastic augmentation"),
    Method("self-training", peer("self_training"), "#aec7e8", "self-training, noisy student (Xie et al., CVPR 2020)"),
    Method("unimatch", peer("unimatch"), "#bcbd22", "UniMatch (Yang et al., CVPR 2023)"),
    Method("bcp", peer("bcp"), "#17becf", "bidirectional copy-paste (Bai et al., CVPR 2023)"),
    Method(
        "brainstorm",
        peer("brainstorm", "registration", "pairs", parts=("pairs",), sections=("refinement",)),
        "#98df8a",
        "pairs by registration alone (Zhao et al., CVPR 2019)",
    ),
    Method(
        "joint+",
        peer(
            "joint_plus",
            "registration",
            "neighbours",
            notebook=OURS,
            parts=("bcp",),
            sections=("refinement",),
        ),
        "#d62728",
        "copy-paste with masks that registration has fused from similar images",
        ("fs+elastic", "bcp"),
        width=2.5,
        in_reliability=True,
    ),
    Method("cctr", CCTR, "#8c564b", "the U-Net of CCT-R", ("cctr-b",)),
    Method("cctr-b", CCTR, "#c49c94", "the Swin transformer of CCT-R"),
    Method(
        "classical",
        CLASSICAL,
        "#2ca02c",
        "labelled images registered by SimpleITK (affine, then diffeomorphic Demons), no training",
    ),
    Method("ants", ANTS, "#9467bd", "labelled images registered by ANTs SyN, no training; majority vote"),
    Method("ants-jlf", ANTS, "#c5b0d5", "the same with joint label fusion (Wang et al., TPAMI 2013)"),
)
BASELINE = METHODS[0]


def by_name():
    """Dictionary of name to Method, in the order of the table."""
    return {method.name: method for method in METHODS}


def stages(trained=True):
    """Stages whose masks are tested, in the order of the table: those that are trained, or the others."""
    found = dict.fromkeys(method.stage for method in METHODS)
    return [stage for stage in found if stage.trained == trained]


def by_stage(name):
    """The Stage of that name."""
    return next(stage for stage in (REGISTRATION, *stages(), *stages(trained=False)) if stage.name == name)


def stages_of(recipe, rate):
    """Stages that a recipe runs at a rate, in the order in which they are trained (that of their notebooks).

    Args:
        rate: per cent; at 100 nothing is unlabelled.
    """
    every = sorted({REGISTRATION, *stages()}, key=lambda stage: stage.notebook)
    return [stage for stage in every if recipe in stage.recipes and not (rate == 100 and stage.needs_unlabelled)]
