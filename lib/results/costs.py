"""`python -m lib.results.costs`: what every stage took, from the notes of all runs, to work/costs.csv.

Seconds, device and precision differ from run to run, so they are in no other result, and git does not hold this file.
`--keep` writes a summary of it by method to results/costs/<kind of machine>.csv, which git does hold.
"""

import argparse
import json
import platform
import re

import pandas as pd

from lib.methods import table
from lib.runs.params import output_root, work_folder

RUN = ["cohort", "recipe", "rate", "seed", "variant"]
COLUMNS = [*RUN, "n_labelled", "stage", "seconds", "device", "precision"]
KEPT = ["cohort", "recipe", "method", "n_labelled", "device", "precision"]


def collect():
    """All notes, one row a stage: COLUMNS. Seconds are those of training, without masks, fields and evaluation."""
    files = sorted(work_folder("costs").rglob("*.json"))
    return pd.DataFrame([json.loads(file.read_text()) for file in files], columns=COLUMNS)


def by_method(costs):
    """Seconds of every method: of its own stage and the stages that it goes on from, averaged over seeds.

    Args:
        costs: of ``collect``.

    Returns:
        pandas.DataFrame with columns KEPT, runs (how many) and seconds (mean). Variants are left out. Registration is
        pre-trained once for all rates.
    """
    plain = costs[costs["variant"] == ""]
    shared = plain[plain["stage"] == table.REGISTRATION.name].set_index(["cohort", "recipe", "seed"])["seconds"]
    seconds = plain.set_index([*RUN[:4], "stage"])["seconds"]
    rows = []
    for method in table.METHODS:
        for row in plain[plain["stage"] == method.stage.name].itertuples():
            total = row.seconds
            for stage in method.stage.needs(row.recipe):
                both = (
                    shared.get((row.cohort, row.recipe, row.seed))
                    if stage == table.REGISTRATION.name
                    else seconds.get((row.cohort, row.recipe, row.rate, row.seed, stage))
                )
                total += both
            rows.append(
                {
                    "cohort": row.cohort,
                    "recipe": row.recipe if method.stage.trained else "-",
                    "method": method.name,
                    "n_labelled": int(row.n_labelled),
                    "device": row.device,
                    "precision": row.precision,
                    "seconds": total,
                }
            )
    grouped = pd.DataFrame(rows, columns=[*KEPT, "seconds"]).groupby(KEPT, sort=False)["seconds"]
    return grouped.agg(runs="size", seconds="mean").round(1).reset_index()


def kind_of_machine():
    """The machine in a file's name: architecture, and what its cores or its GPU can do."""
    import torch  # needed here alone

    what = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    more = "-bf16" if not torch.cuda.is_available() and torch.cpu._is_avx512_bf16_supported() else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{platform.machine()} {what}{more}".lower())


def main():
    parser = argparse.ArgumentParser(prog="python -m lib.results.costs", description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="write results/costs/<kind of machine>.csv, for git")
    given = parser.parse_args()
    costs = collect()
    file = work_folder("costs.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    costs.to_csv(file, index=False)
    print(f"{len(costs)} stages, {costs['seconds'].sum() / 60:.0f} minutes of training: {file}")
    if given.keep and len(costs):
        kept = output_root() / "results" / "costs" / f"{kind_of_machine()}.csv"
        kept.parent.mkdir(parents=True, exist_ok=True)
        by_method(costs).to_csv(kept, index=False)
        print(f"by method: {kept}")


if __name__ == "__main__":
    main()
