"""`python -m lib.segment IMAGES OUT --masks DIR`: masks for a folder of scans, see lib.own. Behind `make segment`.

The exit status is 0 where every case is segmented and 1 where some could not be.
"""

import argparse
import signal
import sys
from pathlib import Path

import matplotlib

from lib import DataError, params
from lib.model_file import load_model
from lib.own import segment_folder
from lib.review import Review


def stop(number, _):
    """What a signal does: what is being written is discarded, what is finished stays. The status is the shell's own."""
    sys.exit(128 + number)


def main():
    description = "Masks for a folder of scans, from masks for a few of them."
    parser = argparse.ArgumentParser(prog="python -m lib.segment", description=description)
    parser.add_argument("images", help="folder of NIfTI images")
    parser.add_argument("output", help="folder for masks, confidence maps, cases.csv and the model")
    parser.add_argument("--masks", default="", help="folder of masks for some of the images")
    parser.add_argument("--model", default="", help="a trained model to apply instead of training one")
    parser.add_argument("-S", action="append", default=[], metavar="KEY=VALUE", dest="values", help="any setting")
    given = parser.parse_args()
    matplotlib.use("Agg")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        settings = params.load(cohort="folder", changes=given.values)
    except ValueError as error:
        sys.exit(f"error: {error}")
    settings.folder |= {"images": given.images, "masks": given.masks, "model": given.model, "output": given.output}
    try:
        table = segment_folder(settings)
    except (DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except SystemExit as stopped:  # reported here: a bar may just be writing where a signal arrives
        print(f"\nstopped by {signal.Signals(stopped.code - 128).name}: the same command goes on from here",
              file=sys.stderr)
        raise
    review = Review(settings, table, load_model(given.model or Path(given.output) / "model.safetensors"))
    if len(review.table):
        for figure, name in (review.predictions(), "confidence.png"), (review.contact_sheet(), "least_certain.png"):
            figure.savefig(Path(given.output) / name, dpi=110)
    failed = table[table["status"] == "failed"]
    for row in failed.itertuples():
        print(f"failed: {row.case}: {row.note}", file=sys.stderr)
    print(f"{len(table) - len(failed)} of {len(table)} cases are segmented, {int(table['review'].sum())} to be reviewed: "
          f"{Path(given.output) / 'cases.csv'}")
    sys.exit(1 if len(failed) else 0)


if __name__ == "__main__":
    main()
