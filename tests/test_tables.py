from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.results import collecting, published, tables
from lib.results.figures import comparisons
from lib.results.statistics import average_classes


def rows_of(recipe, method, scores, seed=1, rate=1, variant="", cohort="made up"):
    """One row per test slice, two slices a subject."""
    return pd.DataFrame(
        [
            {
                "cohort": cohort,
                "recipe": recipe,
                "rate": rate,
                "n_labelled": 5 * rate,
                "seed": seed,
                "variant": variant,
                "method": method,
                "subject": f"s{k // 2}",
                "slice": k,
                "class": "a",
                "dsc": dsc,
                "hd": 10 * (1 - dsc),
                "hd95": 8 * (1 - dsc),
                "empty": dsc == 0,
                "confidence": 0.5 + dsc / 2,
                "round": 0,
            }
            for k, dsc in enumerate(scores)
        ]
    )


def whole(*frames):
    averaged = average_classes(pd.concat(frames, ignore_index=True))
    compared = tables.compare(averaged)
    return averaged, compared, tables.table1(averaged, compared)


def test_classes_are_averaged_first_and_bad_results_stay():
    first, second = rows_of("paper", "fs", [1.0, 0.5]), rows_of("paper", "fs", [0.0, 0.5]).assign(**{"class": "b"})
    _, _, table = whole(first, second)
    overall = table[table["seed"] == "all"].set_index("class")
    assert overall.loc["mean", "dsc_mean"] == 0.5 and overall.loc["mean", "dsc_sd"] == 0
    assert overall.loc["b", "dsc_mean"] == 0.25 and overall.loc["b", "n_empty"] == 1
    assert overall.loc["mean", "n_empty"] == 1 and (overall["n_test"] == 2).all()


def test_comparisons_stand_in_the_order_of_the_rates():
    frames = [rows_of("strong", method, [0.8, 0.9], rate=rate) for rate in (10, 4, 1) for method in ("fs", "mt")]
    _, compared, _ = whole(*frames)
    assert compared.loc[compared["metric"] == "dsc", "rate"].tolist() == [1, 4, 10]


def test_rows_over_seeds_and_of_every_seed():
    _, _, table = whole(rows_of("strong", "fs", [0.8, 0.9]), rows_of("strong", "fs", [0.6, 0.7], seed=2))
    mean = table[table["class"] == "mean"].set_index("seed")
    assert mean.loc[1, "dsc_mean"] == pytest.approx(0.85) and mean.loc[2, "dsc_mean"] == pytest.approx(0.65)
    assert mean.loc["all", "dsc_mean"] == pytest.approx(0.75) and mean.loc["all", "n_seeds"] == 2
    assert mean.loc["all", "dsc_seed_sd"] == pytest.approx(np.std([0.85, 0.65], ddof=1))
    assert mean.loc["all", "n_test"] == 2
    assert mean.loc["all", "dsc_low"] == mean.loc["all", "dsc_high"] == pytest.approx(0.75)  # one subject


def test_the_star_is_combined_against_mt_and_p_is_against_fs():
    rng = np.random.default_rng(0)
    fs = rng.uniform(0.5, 0.6, 24)
    _, compared, table = whole(
        rows_of("paper", "fs", fs),
        rows_of("paper", "mt", fs + 0.01),
        rows_of("paper", "combined", fs + 0.2),
        rows_of("-", "classical", fs - 0.1),
    )
    overall = table[(table["seed"] == "all") & (table["class"] == "mean")].set_index("method")
    assert overall["star"].to_dict() == {"fs": "", "mt": "", "combined": "*↑", "classical": ""}
    assert overall.loc["combined", "p_fs"] == pytest.approx(2 / 2**12)
    assert overall.loc["combined", "p_fs_holm"] >= overall.loc["combined", "p_fs"]
    assert np.isnan(overall.loc["fs", "p_fs"])
    classical = compared[(compared["method"] == "classical") & (compared["metric"] == "dsc")].iloc[0]
    assert classical["recipe"] == "paper" and classical["difference"] == pytest.approx(-0.1)


def test_the_star_says_which_way_and_the_rounds_that_were_tested_are_named():
    scores = np.linspace(0.5, 0.9, 24)
    worse = [rows_of("paper", "combined", scores - 0.1, seed).assign(round=number) for seed, number in ((1, 2), (2, 0))]
    _, _, table = whole(*worse, *(rows_of("paper", "mt", scores, seed) for seed in (1, 2)))
    row = table[(table["seed"] == "all") & (table["class"] == "mean") & (table["method"] == "combined")].iloc[0]
    assert row["star"] == "*↓" and row["rounds"] == "2, 0" and "*↓" in tables.markdown(table)


def test_a_single_subject_does_not_turn_the_arrow_round():
    scores = np.linspace(0.5, 0.9, 24)
    mt, combined = rows_of("paper", "mt", scores), rows_of("paper", "combined", scores - 0.02)
    mt.loc[22:, "dsc"] = 0.0  # one subject, without whom mt is better in all
    _, compared, table = whole(mt, combined)
    row = table[(table["seed"] == "all") & (table["class"] == "mean") & (table["method"] == "combined")].iloc[0]
    assert row["difference_mt"] > 0 and row["effect_mt"] < 0 and row["star"] == "*↓"


def test_what_holds_against_fs_is_said_in_words():
    fs = np.linspace(0.5, 0.7, 24)
    _, compared, _ = whole(
        rows_of("paper", "fs", fs),
        rows_of("paper", "mt", fs - 0.1),
        rows_of("paper", "joint", fs + 0.1),
        rows_of("paper", "combined", fs),
    )
    words = tables.in_words(compared)
    assert words.startswith("- **made up, 1 %, recipe paper.** DSC better: joint +0.100 (+0.100 to +0.100).")
    assert "DSC worse: mt -0.100" in words and "DSC not significantly different: combined +0.000" in words
    assert "HD better: joint -1.00" in words and "HD worse: mt +1.00" in words
    assert "nothing" in tables.in_words(compared[:0])


def test_the_hd_has_its_own_star_and_its_own_p_and_lower_is_better():
    scores = np.linspace(0.5, 0.9, 24)
    fs, mt, combined = (rows_of("paper", method, scores) for method in ("fs", "mt", "combined"))
    combined["hd"] -= 1 + np.arange(24) / 100
    mt["hd"] += 0.5 + np.arange(24) / 100
    _, _, table = whole(fs, mt, combined)
    row = table[(table["seed"] == "all") & (table["class"] == "mean")].set_index("method")
    assert row.loc["combined", "star"] == "" and row.loc["combined", "star_hd"] == "*↑"
    assert row.loc["combined", "p_fs"] == 1 and row.loc["combined", "p_fs_hd"] == pytest.approx(2 / 2**12)
    assert row.loc["combined", "p_fs_holm_hd"] == pytest.approx(3 * 2 / 2**12)  # of three comparisons of the HD
    assert row.loc["mt", "effect_fs_hd"] == 1


def test_methods_and_recipes_come_in_reading_order():
    shuffled = [rows_of(recipe, method, [0.5]) for recipe in ("strong", "paper") for method in ("joint", "mt", "fs")]
    _, _, table = whole(*shuffled)
    overall = table[(table["seed"] == "all") & (table["class"] == "mean")]
    assert list(zip(overall["recipe"], overall["method"])) == [
        ("paper", "fs"),
        ("paper", "mt"),
        ("paper", "joint"),
        ("strong", "fs"),
        ("strong", "mt"),
        ("strong", "joint"),
    ]
    assert "| paper    | fs" in tables.markdown(table) and "0.58 ± 0.27" in published.beside_the_paper(table)


def test_figure_2_shows_the_teacher_at_its_own_rate_and_at_ten_per_cent(tmp_path, monkeypatch):
    folders = []
    for rate, seed in ((1, 1), (10, 1), (50, 1), (10, 2)):
        folders.append(tmp_path / f"{rate}-{seed}")
        folders[-1].mkdir()
        rows_of("paper", "mt", [0.5], seed, rate).to_csv(folders[-1] / "per_image.csv", index=False)
        np.savez(folders[-1] / "mean_teacher_paper.npz", steps=[rate], masks=[[seed]])
    monkeypatch.setattr(collecting, "folders", lambda settings: folders)
    found = collecting.collect_watched(SimpleNamespace(rate=1, seed=1))
    assert list(found) == ["MT, 1 %\npaper recipe", "MT, 10 %\npaper recipe"]
    assert [(int(steps[0]), int(masks[0, 0])) for steps, masks in found.values()] == [(1, 1), (10, 1)]


def test_published_figures_stand_beside_ours_where_the_data_are_the_same():
    rows = rows_of("strong", "fs", [0.5, 0.7], cohort="ACDC").assign(n_labelled=3)
    text = published.beside_the_paper(whole(rows)[2])
    assert "0.600" in text and "UniMatch" in text and "0.876" in text and "other data" not in text
    assert "UniMatch" not in published.beside_the_paper(whole(rows.assign(n_labelled=7))[2])


@pytest.mark.parametrize("counted", ["images", "patients"])
def test_the_label_efficiency_says_what_is_counted(counted):
    few, many = (rows_of("strong", "fs", [dsc, dsc], rate=rate) for rate, dsc in ((1, 0.5), (10, 0.75)))
    _, _, table = whole(few, many)
    upper, lower = comparisons.label_efficiency(table, counted).axes
    assert lower.get_xlabel() == f"labelled {counted}"
    assert [tick.get_text() for tick in lower.get_xticklabels()] == ["5", "50"]
    assert upper.lines[0].get_ydata().tolist() == [0.5, 0.75]


def test_published_figures_have_their_rows_in_table_1():
    per_image = average_classes(
        pd.concat(
            [
                rows_of("strong", "fs", [0.6, 0.6], cohort="ACDC"),
                rows_of("strong", "cctr", [0.9, 0.9], cohort="ACDC"),
            ],
            ignore_index=True,
        )
    ).assign(n_labelled=3)
    table = published.with_published(tables.table1(per_image, tables.compare(per_image)))
    assert set(table["method"]) == {"fs", "cctr", "PS-MT", "BCP", "UniMatch"}
    assert {"fs", "cctr"} == set(tables.metrics(table)["ACDC"]["strong"]["1 %"])
    assert "PS-MT" in tables.markdown(table)


def test_the_summary_has_a_row_a_method_and_a_column_a_number_of_labels():
    _, _, table = whole(
        rows_of("strong", "fs", [0.5, 0.7]),
        rows_of("strong", "fs", [0.7, 0.9], rate=10),
        rows_of("paper", "mt", [0.25, 0.25]),
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.summary(table).splitlines()]
    assert lines[0] == ["DSC (HD in pixels)", "recipe", "5 (1 %)", "50 (10 %)"]
    assert lines[2:] == [["mt", "paper", "0.250 (7.50)", ""], ["fs", "strong", "0.600 (4.00)", "0.800 (2.00)"]]


def test_low_confidence_marks_bad_masks_in_the_calibration_table():
    per_image = average_classes(rows_of("strong", "joint", np.linspace(0.1, 0.9, 20)))
    bins = pd.DataFrame(
        [
            {
                "cohort": "made up",
                "recipe": "strong",
                "rate": 1,
                "seed": 1,
                "variant": "",
                "method": "joint",
                "low": 0.5,
                "high": 0.55,
                "n": 10,
                "probability": 0.52,
                "frequency": 0.5,
                "brier": 0.25,
            }
        ]
    )
    row = tables.calibrated(per_image, bins).iloc[0]
    assert row["ece"] == pytest.approx(0.02) and row["brier_marked"] == 0.25
    assert row["spearman"] == pytest.approx(1) and row["auroc_worst_tenth"] == 1
    shifted = per_image.assign(seed=2, confidence=per_image["confidence"] - 0.4)  # a second network, less confident
    both = tables.calibrated(pd.concat([per_image, shifted]), pd.concat([bins, bins.assign(seed=2)])).iloc[0]
    assert both["seeds"] == 2 and both["spearman"] == pytest.approx(1) and both["auroc_worst_tenth"] == 1
