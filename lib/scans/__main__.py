"""`python -m lib.scans IMAGES OUT --masks DIR`: masks for a folder of scans, see scans.segment. Behind `make segment`.

The exit status is 0 where every case is segmented and 1 where some could not be.
"""

import argparse
import signal
import sys
from pathlib import Path

import matplotlib

from lib import DataError
from lib.runs import params
from lib.runs.files import replacing
from lib.scans.networks.model_file import load_model
from lib.scans.review import Review
from lib.scans.segment import at_work, segment_folder

AGAIN = 2  # seconds after which a signal that had no effect is raised again


def stop(number, _):
    """End after a signal: what is being written is discarded, what is finished stays. The status is the shell's own."""
    # Python discards an exception that is raised while a destructor runs: it is raised again until it gets through.
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(128 + number))
    signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
    sys.exit(128 + number)


def main():
    description = "Masks for a folder of scans, from masks for a few of them."
    otherwise = "What is not given is taken from section `folder` of params.yaml."
    parser = argparse.ArgumentParser(prog="python -m lib.scans", description=description, epilog=otherwise)
    parser.add_argument("images", nargs="?", help="folder of NIfTI images")
    parser.add_argument("output", nargs="?", help="folder for masks, confidence maps, cases.csv and the model")
    parser.add_argument("--masks", help="folder of masks for some of the images")
    parser.add_argument("--model", help="a trained model to apply instead of training one")
    parser.add_argument("-S", action="append", default=[], metavar="KEY=VALUE", dest="values", help="any setting")
    given = parser.parse_args()
    matplotlib.use("Agg")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        settings = params.load("strong", "folder", changes=given.values)
    except ValueError as error:
        sys.exit(f"error: {error}")
    params.use_folder(settings, images=given.images, masks=given.masks, output=given.output, model=given.model)
    if not (settings.folder.images and settings.folder.output):
        parser.error("give IMAGES and OUT, or folder.images and folder.output in params.yaml")
    try:
        failed = segment(settings)
    except (DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except SystemExit as stopped:  # reported here: a bar may just be writing where a signal arrives
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(
            f"\nstopped by {signal.Signals(stopped.code - 128).name}: the same command goes on from here",
            file=sys.stderr,
        )
        raise
    sys.exit(1 if failed else 0)


def segment(settings):
    """Masks, pictures and the summary; returns how many cases failed."""
    output = Path(settings.folder.output)
    table = segment_folder(settings)
    with at_work(settings):
        review = Review(settings, table, load_model(settings.folder.model or output / "model.safetensors"))
        if len(review.table):
            for figure, name in (review.predictions(), "confidence"), (review.contact_sheet(), "least_certain"):
                with replacing(output / f"{name}.png") as partial:
                    figure.savefig(partial, dpi=110)
    failed = table[table["status"] == "failed"]
    for row in failed.itertuples():
        print(f"failed: {row.case}: {row.note}", file=sys.stderr)
    print(
        f"{len(table) - len(failed)} of {len(table)} cases are segmented, {int(table['review'].sum())} to be reviewed: "
        f"{output / 'cases.csv'}"
    )
    return len(failed)


if __name__ == "__main__":
    main()
