"""Tables: Table 1 with its statistics, the paper's figures beside ours, the ablation, calibration."""

import itertools

import numpy as np
import pandas as pd

from lib import DataError, calibration, grid, statistics
from lib.params import RECIPES, results_folder

METHODS = ("fs", "mt", "registration", "joint", "combined", "registration+", "joint+", "combined+", "cctr", "cctr-b",
           "classical")
GROUP = ["cohort", "recipe", "method", "class", "rate", "n_labelled"]
SCORES = ("dsc", "hd", "hd95")
PAIRS = [*((method, "fs") for method in METHODS[1:]), ("combined", "mt"), ("combined+", "mt"),
         ("combined+", "joint+"), ("combined+", "registration+"),
         *(("cctr", method) for method in ("mt", "joint", "combined", "joint+", "cctr-b"))]
WITH_ROUNDS = {"registration", "joint", "combined", "registration+", "joint+", "combined+"}
ABLATED = {"joint+": "combined+", "cctr": "cctr-b"}  # methods with variants, and what each brings along

TABULATED = ("cctr", "cctr-b")  # methods whose variants stand in Table 1 as well

KEYS = ["cohort", "recipe", "rate", "seed", "variant"]
ROUNDS = [*KEYS, "stage", "round", "split", "n", "dsc_segmentation", "dsc_registration", "dsc_pseudo_masks",
          "mean_confidence", "folding", "weight", "best_for"]
REGISTRATION = [*KEYS, "stage", "round", "split", "n", "dsc_unregistered", "dsc_single", "gncc_before", "gncc_after",
                "folding", "inverse_consistency"]

# Table 1 of P1: method, rate -> DSC mean, sd, HD mean, sd
PAPER = {
    ("fs", 1): (0.58, 0.27, 32.76, 45.33), ("fs", 10): (0.83, 0.15, 14.44, 22.39),
    ("fs", 50): (0.92, 0.05, 10.06, 21.40), ("fs", 100): (0.93, 0.02, 8.43, 19.70),
    ("mt", 1): (0.47, 0.31, 80.45, 61.74), ("mt", 10): (0.85, 0.09, 14.16, 24.96),
    ("mt", 50): (0.90, 0.06, 11.21, 22.03), ("joint", 1): (0.85, 0.05, 12.87, 17.97),
    ("joint", 10): (0.86, 0.06, 11.90, 18.47), ("joint", 50): (0.92, 0.05, 9.84, 21.64),
    ("combined", 1): (0.84, 0.05, 11.60, 18.57), ("combined", 10): (0.87, 0.04, 11.26, 18.77),
    ("combined", 50): (0.92, 0.03, 8.99, 19.56),
}

# Published mean DSC over classes and the 20 test patients, by cohort and labelled patients; 256 x 256, full schedules.
AUTHORS = "its authors'"
PUBLISHED = {"ACDC": {3: {"PS-MT": 0.8694, "BCP": 0.8759, "UniMatch": 0.8761}}}


def folders(settings):
    """Where results of single experiments lie: those of the grid, then the pipeline's own, which take precedence."""
    return [*grid.finished(settings), results_folder(settings) / "items" / f"{settings.rate:g}-seed_{settings.seed}"]


def collect(settings):
    """All results of a cohort: (per image, reliability bins, rounds), one experiment once.

    Raises:
        DataError: there are none.
    """
    found = []
    for name in ("per_image", "reliability", "rounds"):
        frames = []
        for folder in folders(settings):
            if (folder / f"{name}.csv").exists():
                frame = pd.read_csv(folder / f"{name}.csv", dtype={"subject": str, "variant": str},
                                    keep_default_na=False, na_values=[""])
                frame["variant"] = frame["variant"].fillna("")
                frames.append(frame)
        if not frames:
            raise DataError(f"no {name}.csv under {results_folder(settings) / 'items'}: run notebooks 2 to 8 first")
        late = {key: number for number, frame in enumerate(frames)
                for key in frame[owner(frame)].itertuples(index=False)}
        kept = [frame[[late[key] == number for key in frame[owner(frame)].itertuples(index=False)]]
                for number, frame in enumerate(frames)]
        found.append(pd.concat(kept, ignore_index=True))
    found[2] = found[2].reindex(columns=list(dict.fromkeys([*ROUNDS, *REGISTRATION])))
    return found


def owner(frame):
    """Columns that say which experiment a row belongs to."""
    return [column for column in (*KEYS, "method") if column in frame]


def collect_watched(settings):
    """Masks of Mean Teacher's teacher as it learnt: dictionary of label to (steps, masks).

    Of the settings' seed and, as in Figure 2 of P1, at the settings' rate and at 10 %.
    """
    found = {}
    for folder in folders(settings):
        for file in sorted(folder.glob("mean_teacher_*.npz")):
            row = pd.read_csv(folder / "per_image.csv", nrows=1).iloc[0]
            if row["seed"] == settings.seed and row["rate"] in (settings.rate, 10):
                recipe = file.stem.removeprefix("mean_teacher_")
                with np.load(file) as archive:
                    found[recipe, float(row["rate"])] = archive["steps"], archive["masks"]
    return {f"MT, {rate:g} %\n{recipe} recipe": value for (recipe, rate), value in sorted(found.items())}


def average_classes(per_image):
    """``per_image`` with a row of class ``mean`` per image and method added: the average over foreground classes."""
    averaged = {**dict.fromkeys((*SCORES, "confidence"), "mean"), "empty": "any"}
    keys = [c for c in per_image.columns if c != "class" and c not in averaged]
    means = per_image.groupby(keys, sort=False, as_index=False, dropna=False).agg(averaged)
    return pd.concat([means.assign(**{"class": "mean"}), per_image], ignore_index=True)[per_image.columns]


def with_variants(per_image):
    """Rows without a variant, and those of TABULATED with one, whose method is then named after both."""
    chosen = per_image[(per_image["variant"] == "") | per_image["method"].isin(TABULATED)]
    named = chosen["method"] + ", " + chosen["variant"]
    return chosen.assign(method=chosen["method"].where(chosen["variant"] == "", named))


def in_order(table):
    """Rows by cohort, recipe, rate, class and method, as a reader expects them."""
    rank = {name: number for number, name in enumerate([*RECIPES, *METHODS])}
    key = lambda column: column.map(rank).fillna(99) if column.name in ("recipe", "method") else (
        column != "mean" if column.name == "class" else column)
    return table.sort_values(["cohort", "recipe", "rate", "class", "method"], key=key, kind="stable", ignore_index=True)


def compare(per_image):
    """Paired tests of PAIRS; see statistics.compare. The classical reference is compared with fs of every recipe.

    Recipes and rates stand in their order, whatever that in which their results were found.

    Args:
        per_image: rows of class ``mean`` among them (average_classes), without variants.
    """
    classical = per_image["method"] == "classical"
    recipes = per_image.loc[~classical, "recipe"].unique()
    copies = [per_image[classical].assign(recipe=recipe) for recipe in recipes]
    together = pd.concat([per_image[~classical], *copies]).sort_values(["recipe", "rate"], kind="stable")
    return statistics.compare(together, PAIRS, SCORES)


def table1(per_image, comparisons):
    """Table 1: mean and standard deviation over test images, of every seed and over all seeds.

    Args:
        per_image: rows of average_classes, without variants but those of ``with_variants``.
        comparisons: of ``compare``.

    Returns:
        pandas.DataFrame. Rows with seed ``all`` are over all n_seeds: means over test images and seeds, sd over all
        of them, and dsc_seed_sd, hd_seed_sd, the sd of the seeds' means. Those of class ``mean`` also have the 95 %
        interval of the DSC over subjects (dsc_low, dsc_high) and the tests against fs of the same recipe (p_fs,
        p_fs_holm, effect_fs) and of combined and combined+ against mt (p_mt, difference_mt, effect_mt), of the DSC
        and, ending in ``_hd``, of the HD; star is the paper's, p_mt below 0.05, uncorrected, with an arrow: up is
        better, a higher DSC or a lower HD, by the ranks on which the test rests (effect_mt), which single subjects
        do not turn as they may the means. Column rounds says which round was tested, seed by seed. The classical
        reference has no recipe, so that its tests against fs of either recipe are in ``comparisons`` alone.
    """
    summary = {"n_test": ("dsc", "size"), "n_empty": ("empty", "sum"), "train_seconds": ("seconds", "mean"),
               "device": ("device", lambda names: "; ".join(sorted(set(names.dropna()))))}
    for name in SCORES:
        summary |= {f"{name}_mean": (name, "mean"), f"{name}_sd": (name, "std")}
    by_seed = per_image.groupby([*GROUP, "seed"], sort=False).agg(**summary).reset_index()
    overall = per_image.groupby(GROUP, sort=False).agg(**summary, n_seeds=("seed", "nunique")).reset_index()
    rounds = per_image.sort_values("seed").drop_duplicates([*GROUP, "seed"]).groupby(GROUP, sort=False)["round"]
    joined = rounds.agg(lambda numbers: ", ".join(f"{number:g}" for number in numbers))
    overall = overall.merge(joined.rename("rounds").reset_index(), on=GROUP)
    overall["n_test"] //= overall["n_seeds"]
    spread = by_seed.groupby(GROUP, sort=False)[["dsc_mean", "hd_mean"]].std().reset_index()
    overall = overall.merge(spread.rename(columns={"dsc_mean": "dsc_seed_sd", "hd_mean": "hd_seed_sd"}), on=GROUP)
    overall = overall.merge(intervals(per_image), on=["cohort", "recipe", "rate", "method", "class"], how="left")
    keys = ["cohort", "recipe", "rate", "method"]
    if not len(comparisons):
        comparisons = pd.DataFrame(columns=[*keys, "metric", "reference", "difference", "p", "p_holm", "effect"])
    columns = {"fs": {"p": "p_fs", "p_holm": "p_fs_holm", "effect": "effect_fs"},
               "mt": {"p": "p_mt", "difference": "difference_mt", "effect": "effect_mt"}}
    for metric, ending, better in (("dsc", "", 1), ("hd", "_hd", -1)):
        tested = comparisons[comparisons["metric"] == metric]
        for reference, names in columns.items():
            ours = {theirs: name + ending for theirs, name in names.items()}
            rows = tested[tested["reference"] == reference][[*keys, *ours]].rename(columns=ours)
            overall = overall.merge(rows.assign(**{"class": "mean"}), on=[*keys, "class"], how="left")
        direction = np.where(better * overall[f"effect_mt{ending}"].astype(float) > 0, "*↑", "*↓")
        overall[f"star{ending}"] = np.where(overall[f"p_mt{ending}"].astype(float) < 0.05, direction, "")
    whole = pd.concat([overall.assign(seed="all"), by_seed.assign(n_seeds=1)], ignore_index=True)
    ordered = ["cohort", "method", "recipe", "class", "rate", "n_labelled", "seed", "n_seeds", "n_test",
               *(f"{name}_{what}" for name in SCORES for what in ("mean", "sd")), "n_empty"]
    return in_order(whole[[*ordered, *(c for c in whole.columns if c not in ordered)]])


def with_published(table):
    """Table 1 with published figures from the same test patients: rows of their own, and a column dsc_published."""
    shared = table[["cohort", "rate", "n_labelled"]].drop_duplicates()
    rows = [{**key, "method": method, "recipe": AUTHORS, "class": "mean", "seed": "all", "dsc_published": dsc}
            for key in shared.to_dict("records")
            for method, dsc in PUBLISHED.get(key["cohort"], {}).get(key["n_labelled"], {}).items()]
    counts = dict.fromkeys(("n_seeds", "n_test", "n_empty"), "Int64")  # which published figures have not
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True).astype(counts) if rows else table


def intervals(per_image):
    """95 % bootstrap intervals of the mean DSC over subjects, of class ``mean``."""
    rows = []
    mean = per_image[per_image["class"] == "mean"]
    for (cohort, recipe, rate), group in mean.groupby(["cohort", "recipe", "rate"], sort=False):
        for method, values in statistics.per_subject(group, "dsc").items():
            low, high = statistics.interval(values.dropna())
            rows.append({"cohort": cohort, "recipe": recipe, "rate": rate, "method": method, "class": "mean",
                         "dsc_low": low, "dsc_high": high})
    return pd.DataFrame(rows)


def spread(row, name, digits):
    """``mean ± sd`` of a row of Table 1; the mean alone where there is one value, nothing where there is none."""
    mean, sd = row[name + "_mean"], row[name + "_sd"]
    if pd.isna(mean):
        return ""
    return f"{mean:.{digits}f}" if pd.isna(sd) else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def figure(value, digits):
    """A number for reading; nothing where there is none."""
    return "" if pd.isna(value) else f"{value:.{digits}f}"


def as_markdown(rows):
    """Rows (dictionaries or a frame) as a Markdown table, cells as they are."""
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


def markdown(table):
    """Table 1 for reading: mean ± sd over test images and seeds, the spread of seeds, and the tests against fs.

    With one foreground class its rows would repeat those of ``mean``, so they are left out.
    """
    table = table[table["seed"].astype(str) == "all"]
    several = table.groupby("cohort")["class"].transform("nunique") > 2
    published = "dsc_published" in table
    table = table.fillna({"star": "", "star_hd": "", "rounds": ""})
    whole = lambda number: "" if pd.isna(number) else int(number)
    rows = []
    for _, row in table[(table["class"] == "mean") | several].iterrows():
        rows.append({
            "cohort": row["cohort"], "labelled": f"{row['n_labelled']} ({row['rate']:g} %)", "recipe": row["recipe"],
            "method": row["method"], **({"class": row["class"]} if several.any() else {}),
            "seeds": whole(row["n_seeds"]), "n": whole(row["n_test"]),
            "DSC": spread(row, "dsc", 3) + (" " + row["star"]).rstrip(),
            **({"DSC, published": figure(row["dsc_published"], 3)} if published else {}),
            "sd of seeds": "" if pd.isna(row["dsc_seed_sd"]) else f"{row['dsc_seed_sd']:.3f}",
            "HD (px)": spread(row, "hd", 2) + (" " + row["star_hd"]).rstrip(),
            "HD95 (px)": spread(row, "hd95", 2), "empty": whole(row["n_empty"]),
            "round": row["rounds"] if row["method"] in WITH_ROUNDS else "",
            "p against fs: DSC": p_value(row["p_fs_holm"]), "HD": p_value(row["p_fs_holm_hd"]),
        })
    return as_markdown(rows)


def summary(table):
    """Table 1 at a glance, as Markdown: mean DSC and, in brackets, HD of every recipe and method against the labels.

    Args:
        table: of ``with_published``.
    """
    table = table[(table["seed"].astype(str) == "all") & (table["class"] == "mean")]
    ours = lambda row: f"{row['dsc_mean']:.3f} ({row['hd_mean']:.2f})"
    cells = [ours(row) if pd.notna(row["dsc_mean"]) else f"{row['dsc_published']:.3f}" for _, row in table.iterrows()]
    table = table.assign(cell=cells, labelled=[f"{n} ({rate:g} %)" for n, rate in zip(table["n_labelled"], table["rate"])])
    keys = ["method", "recipe", *["cohort"] * (table["cohort"].nunique() > 1)]
    wide = table.pivot(index=keys, columns="labelled", values="cell").fillna("")
    wide = wide.loc[pd.MultiIndex.from_frame(table[keys].drop_duplicates()),
                    table.sort_values("n_labelled")["labelled"].unique()]
    return as_markdown(wide.reset_index().rename(columns={"method": "DSC (HD in pixels)"}))


def p_value(p):
    """p for reading; nothing where there was no test."""
    return "" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def in_words(comparisons):
    """What can be told from chance against fs, as Markdown: one item per cohort, rate and recipe.

    Args:
        comparisons: of ``compare``.

    Returns:
        For DSC and HD the methods that are better, worse or neither (p_holm below 0.05, the side by the ranks, see
        ``table1``), with the mean difference from fs and its 95 % interval over subjects.
    """
    if not len(comparisons):
        return "There is nothing to compare with fs yet.\n"
    lines = []
    against = comparisons[comparisons["reference"] == "fs"]
    for (cohort, rate, recipe), group in against.groupby(["cohort", "rate", "recipe"], sort=False):
        said = []
        for metric, digits, better in (("dsc", 3, 1), ("hd", 2, -1)):
            named = {"better": [], "worse": [], "level": []}
            for _, row in group[group["metric"] == metric].iterrows():
                side = "level" if row["p_holm"] >= 0.05 else "better" if better * row["effect"] > 0 else "worse"
                figures = [f"{row[column]:+.{digits}f}" for column in ("difference", "low", "high")]
                named[side].append("{} {} ({} to {})".format(row["method"], *figures))
            said += [f"{metric.upper()} {side}: {', '.join(methods)}." for side, methods in named.items() if methods]
        lines.append(f"- **{cohort}, {rate:g} %, recipe {recipe}.** {' '.join(said)}")
    return "\n".join(lines) + "\n"


def beside_the_published(table):
    """Our mean DSC beside published figures from the same test patients: one row per method and labelled patients."""
    rows = []
    for (cohort, labelled), group in table.groupby(["cohort", "n_labelled"], sort=False):
        head = {"cohort": cohort, "labelled patients": labelled}
        for _, row in group.iterrows():
            rows.append({**head, "method": row["method"], "recipe": row["recipe"], "seeds": row["n_seeds"],
                         "DSC, here": f"{row['dsc_mean']:.3f}", "DSC, published": ""})
        for name, dsc in PUBLISHED[cohort].get(labelled, {}).items():
            rows.append({**head, "method": name, "recipe": AUTHORS, "seeds": "", "DSC, here": "",
                         "DSC, published": f"{dsc:.3f}"})
    return as_markdown(rows)


def beside_the_paper(table):
    """Our Table 1 beside the paper's, which is from other data: one row per method and rate.

    Where there are published figures from the same data, it stands beside those instead.
    """
    table = table[(table["seed"].astype(str) == "all") & (table["class"] == "mean") & table["dsc_mean"].notna()]
    ours = table[~table["cohort"].str.contains("unseen")]
    if set(ours["cohort"]) <= set(PUBLISHED):
        return beside_the_published(ours)
    rows, cohort = [], ours["cohort"].iloc[0]
    for rate in sorted(set(ours["rate"]) | {1}):
        for method in METHODS:
            found = ours[(ours["rate"] == rate) & (ours["method"] == method)].set_index("recipe")
            paper = PAPER.get((method, rate))
            if not len(found) and not paper:
                continue
            row = {"our cohort": cohort, "method": method, "rate": f"{rate:g} %"}
            for name, at, digits in (("DSC", 0, 2), ("HD", 2, 2)):
                for recipe in ours["recipe"].unique():
                    label = f"{name}, {'ours, not trained' if recipe == '-' else f'ours, recipe {recipe}'}"
                    row[label] = spread(found.loc[recipe], name.lower(), digits) if recipe in found.index else ""
                row[f"{name}, the paper (other data)"] = f"{paper[at]:.2f} ± {paper[at + 1]:.2f}" if paper else ""
            rows.append(row)
    return as_markdown(rows)


def ablation(per_image, rounds):
    """What each part of a method brings: joint+, or CCT-R, as it stands and with a part changed, over the same seeds.

    Args:
        per_image: rows of average_classes, variants among them.
        rounds: rows of rounds.csv, variants among them.

    Returns:
        pandas.DataFrame, one row per variant and class, and one of the whole method: DSC and HD on the test images
        of the method and of its companion (combined+, or CCT-R's second network), DSC of fs (that of the same
        labelled images), the differences of DSC and HD, of method and companion, from those of the whole method with,
        of class ``mean``, their p (Wilcoxon over subjects) and p_holm, corrected over the variants of the same method
        and rate, and the best validation DSC, of joint+'s rounds or as CCT-R was trained.
    """
    test = per_image[~per_image["cohort"].str.contains("unseen")]
    rows = []
    for (cohort, recipe, rate, label), group in test.groupby(["cohort", "recipe", "rate", "class"], sort=False):
        for method, companion in ABLATED.items():
            own = group[group["method"] == method]
            variants = own.loc[own["variant"] != "", "variant"].unique()
            for variant in ["", *variants] if len(variants) else []:
                seeds = own.loc[(own["variant"] == variant) if variant else (own["variant"] != ""), "seed"].unique()
                chosen = group[(group["variant"] == variant) & group["seed"].isin(seeds)]
                score = lambda name, of: chosen.loc[chosen["method"] == name, of].mean()
                row = {"cohort": cohort, "recipe": recipe, "rate": rate, "method": method,
                       "variant": variant or "as it stands", "class": label, "seeds": len(seeds),
                       "fs dsc": score("fs", "dsc"), "dsc": score(method, "dsc"), "hd": score(method, "hd"),
                       "companion": companion,
                       "companion dsc": score(companion, "dsc"), "companion hd": score(companion, "hd")}
                whole = group[(group["variant"] == "") & group["seed"].isin(seeds)]
                both = ("", method), ("companion ", companion)
                for (prefix, name), metric in itertools.product(both, ("dsc", "hd")):
                    column = prefix + ("hd " if metric == "hd" else "")
                    difference, p = changed(chosen, whole, name, metric) if variant else (np.nan, np.nan)
                    row |= {f"{column}difference": difference, f"{column}p": p if label == "mean" else np.nan}
                measured = rounds[(rounds["variant"] == variant) & (rounds["stage"] == method)
                                  & (rounds["rate"] == rate) & (rounds["recipe"] == recipe)
                                  & (rounds["split"] == "validation") & rounds["seed"].isin(seeds)]
                if label == "mean":
                    row["validation dsc"] = measured.groupby("seed")["dsc_segmentation"].max().mean()
                rows.append(row)
    if not rows:
        return pd.DataFrame(columns=["cohort", "recipe", "rate", "method", "variant", "class", "seeds"])
    table = pd.DataFrame(rows)
    for column in [column for column in table if column.endswith(" p") or column == "p"]:
        corrected = table.groupby(["cohort", "recipe", "rate", "method"])[column].transform(statistics.holm)
        table[f"{column}_holm"] = corrected
    return table


def changed(chosen, whole, method, metric):
    """By how much a variant changes a method, and whether that can be chance.

    Args:
        chosen, whole: rows of one class on the same test images, of the variant and of the whole method.
        metric: dsc, or hd in pixels.

    Returns:
        (difference of the means over subjects, p of Wilcoxon's signed-rank test over subjects); NaN where one of the
        two lacks the method.
    """
    if method not in set(chosen["method"]) & set(whole["method"]):
        return np.nan, np.nan
    variant, reference = (statistics.per_subject(frame, metric)[method] for frame in (chosen, whole))
    return float((variant - reference).mean()), statistics.wilcoxon(variant, reference)[0]


def ablation_markdown(table):
    """The ablation for reading; says so where it has not been run. A single class would repeat ``mean``."""
    if not len(table):
        return "The ablation has not been run: `dvc exp run -S 'grid.variants=[no pairs]'`, see params.yaml.\n"
    several = table["class"].nunique() > 2
    rows = []
    for _, row in table[(table["class"] == "mean") | several].iterrows():
        rows.append({
            "cohort": row["cohort"], "rate": f"{row['rate']:g} %", "method": row["method"], "variant": row["variant"],
            **({"class": row["class"]} if several else {}), "seeds": row["seeds"],
            "validation DSC": figure(row["validation dsc"], 3),
            "fs DSC": figure(row["fs dsc"], 3), "DSC": figure(row["dsc"], 3), "HD (px)": figure(row["hd"], 2),
            "difference of DSC": "" if pd.isna(row["difference"]) else f"{row['difference']:+.4f}",
            "p": p_value(row["p_holm"]), "p of HD": p_value(row["hd p_holm"]),
            "combined+ or cctr-b: DSC": figure(row["companion dsc"], 3), "HD": figure(row["companion hd"], 2),
            "its p": p_value(row["companion p_holm"]), "its p of HD": p_value(row["companion hd p_holm"]),
        })
    return as_markdown(rows)


def calibrated(per_image, bins):
    """Calibration and quality control of every method: one row per cohort, recipe, rate and method.

    Pixels of all seeds are taken together; rank correlation and AUROC are means over seeds, as every seed's networks
    have a level of confidence of their own, with which they are used.
    """
    keys = ["cohort", "recipe", "rate", "method"]
    images = per_image[(per_image["class"] == "mean") & (per_image["variant"] == "")].groupby(keys, sort=False)
    rows = []
    for key, group in bins[bins["variant"] == ""].groupby(keys, sort=False):
        control = pd.DataFrame([calibration.quality_control(one["confidence"], one["dsc"])
                                for _, one in images.get_group(key).groupby("seed")])
        rows.append({**dict(zip(keys, key)), "seeds": len(control), **calibration.errors(group), **control.mean()})
    return pd.DataFrame(rows)


def metrics(table):
    """Nested figures for `dvc metrics`: cohort, recipe, rate, method, then dsc, hd and hd95, of class ``mean``."""
    tree = {}
    ours = table[(table["class"] == "mean") & (table["seed"].astype(str) == "all") & table["dsc_mean"].notna()]
    for _, row in ours.iterrows():
        leaf = tree.setdefault(row["cohort"], {}).setdefault(row["recipe"], {}).setdefault(f"{row['rate']:g} %", {})
        leaf[row["method"]] = {name: round(float(row[f"{name}_mean"]), 6) for name in SCORES}
    return tree
