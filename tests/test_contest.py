import numpy as np
import pandas as pd
import pytest

from lib.methods import table as methods
from lib.results import contest, course
from lib.runs import params

GAIN = 0.05


def scores(methods, draws=(1, 2), subjects=12, labelled=(1, 5), level=()):
    """Two slices a subject; joint+ is GAIN above bcp on every one, and bcp above fs."""
    rng, rows = np.random.default_rng(0), []
    level = {"fs": -0.05, contest.BASELINE: -0.02, "bcp": 0.0, contest.OURS: GAIN, **dict(level)}
    for number in labelled:
        for seed in draws:
            for subject in range(subjects):
                base = 0.8 + 0.05 * rng.standard_normal()
                rows += [
                    {
                        "cohort": "c",
                        "method": method,
                        "n_labelled": number,
                        "seed": seed,
                        "variant": "",
                        "subject": f"s{subject}",
                        "class": "mean",
                        "dsc": base + level[method] + (0.01 if half else -0.01),
                        "hd95": 2.0,
                        "minutes": 3.0,
                        "device": "CPU (1 threads)",
                    }
                    for method in methods
                    for half in (0, 1)
                ]
    return pd.DataFrame(rows)


@pytest.fixture(autouse=True)
def split(tmp_path, monkeypatch):
    """A split with three validation images."""
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    rows = [{"slice": k, "subject": f"s{k}", "split": "validation" if k < 3 else "train"} for k in range(9)]
    pd.DataFrame(rows).to_csv(params.results_folder(params.load()) / "split.csv", index=False)


def test_the_difference_is_from_the_best_peer_on_the_same_draws_and_subjects():
    table = contest.contest(scores(["fs", "bcp", contest.OURS]), params.load())
    assert table["method"].tolist() == ["fs", "bcp", contest.OURS] * 2
    ours = table[table["method"] == contest.OURS]
    assert (ours["best_peer"] == "bcp").all() and table["best_peer_difference"].notna().sum() == 2
    for column in ("best_peer_difference", "difference_low", "difference_high"):
        assert ours[column].tolist() == pytest.approx([GAIN] * 2)  # paired: what subjects differ in is gone
    assert (table["dsc_low"] < table["dsc_mean"]).all() and (table["dsc_mean"] < table["dsc_high"]).all()
    training = params.load().strong.training
    assert (table["images_seen"] == training.steps * training.batch).all() and (table["hidden_masks"] == 0).all()
    assert "+0.050 (+0.050 to +0.050) against bcp" in contest.markdown(table)


def test_a_draw_that_one_of_two_lacks_does_not_count_in_their_difference():
    rows = scores(["bcp", contest.OURS])
    lacking = rows[(rows["method"] != contest.OURS) | (rows["seed"] == 1)]
    ours = contest.contest(lacking, params.load()).query("method == @contest.OURS")
    assert (ours["draws"] == 1).all() and ours["best_peer_difference"].tolist() == pytest.approx([GAIN] * 2)


def test_the_interval_is_wider_where_draws_differ_and_narrower_with_more_subjects():
    rng = np.random.default_rng(1)
    width = lambda array: np.subtract(*contest.interval(array)[::-1])
    subjects = rng.normal(0.8, 0.1, (1, 40))
    alike = np.repeat(subjects, 4, axis=0)
    apart = alike + np.array([[-0.1], [0.1], [-0.05], [0.05]])
    assert width(apart) > 1.3 * width(alike) > 1.3 * width(np.tile(alike, (1, 4)))
    low, high = contest.interval(alike)
    expected = 2 * 1.96 * subjects.std() / np.sqrt(40)
    assert low < alike.mean() < high and high - low == pytest.approx(expected, rel=0.15)


def test_a_variant_is_compared_with_its_method_on_the_draws_that_both_have():
    rows = scores([contest.OURS, "bcp"], labelled=(1,))
    ours = rows[rows["method"] == contest.OURS]
    worse = ours[ours["seed"] == 1].assign(variant="no pasting", dsc=ours["dsc"] - 0.02)
    other = ours.assign(variant="never beside it", seed=9)
    together = pd.concat([rows, worse, other], ignore_index=True)
    table = contest.ablation(together)
    assert table[["method", "variant", "draws"]].to_numpy().tolist() == [[contest.OURS, "no pasting", 1]]
    assert table[["difference", "difference_low", "difference_high"]].iloc[0].tolist() == pytest.approx([-0.02] * 3)
    assert "-0.020 to -0.020" in contest.ablation_markdown(table)
    assert "No variant" in contest.ablation_markdown(contest.ablation(rows))
    assert contest.contest(together, params.load()).equals(contest.contest(rows, params.load()))


def test_external_cases_have_rows_of_their_own():
    rows = scores([contest.BASELINE, contest.OURS], labelled=(1,))
    further = rows.assign(cohort="c, external", subject="x" + rows["subject"], dsc=rows["dsc"] - 0.1)
    table = contest.contest(pd.concat([further, rows], ignore_index=True), params.load())
    assert table["split"].tolist() == ["test"] * 2 + ["external"] * 2
    fallen = table["dsc_mean"].iloc[:2].to_numpy() - table["dsc_mean"].iloc[2:].to_numpy()
    assert fallen == pytest.approx([0.1, 0.1]) and "| external" in contest.markdown(table)
    (drawn,) = contest.chart(table).axes[0].containers
    assert len(drawn.lines[0].get_ydata()) == 1  # test images alone are drawn


def test_what_chooses_by_validation_has_rows_of_its_own_that_say_how_many_masks_it_looked_at():
    rows = scores(["bcp", contest.OURS], labelled=(1,))
    looked = rows.assign(variant="chosen by validation", dsc=rows["dsc"] + 0.01)
    trained = rows[rows["method"] == "bcp"].assign(variant="validation masks train", dsc=rows["dsc"] + 0.1)
    table = contest.contest(pd.concat([rows, looked, trained], ignore_index=True), params.load())
    assert table["selection"].tolist() == ["none", "none", "training", "validation", "validation"]
    assert table["hidden_masks"].tolist() == [0, 0, 3, 3, 3]
    ours = table[table["method"] == contest.OURS]  # not against a peer that has trained on more masks
    assert ours["best_peer_difference"].tolist() == pytest.approx([GAIN, GAIN])
    assert not len(contest.ablation(pd.concat([rows, looked, trained], ignore_index=True)))


def test_where_nothing_has_run_the_table_says_so():
    table = contest.contest(contest.collect(params.load()), params.load())
    assert len(table) == 0 and "has not been run" in contest.markdown(table)


def test_every_method_is_drawn_by_its_difference_from_the_baseline():
    table = contest.contest(scores(["fs", contest.BASELINE, contest.OURS]), params.load())
    (axes,) = contest.chart(table).axes
    drawn = {each.get_label(): each.lines[0].get_ydata() for each in axes.containers}
    assert set(drawn) == {"fs", contest.OURS}
    assert drawn[contest.OURS] == pytest.approx([GAIN + 0.02] * 2) and drawn["fs"] == pytest.approx([-0.03] * 2)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5"]


def test_every_method_is_drawn_at_its_minutes_and_hollow_where_they_are_a_gpus():
    rows = scores(["fs", contest.BASELINE, contest.OURS])
    rows = rows.assign(minutes=rows["method"].map({"fs": 1.0, contest.BASELINE: 2.0, contest.OURS: 9.0}))
    rows["device"] = rows["method"].map({"fs": "GPU"}).fillna("CPU, 1 thread")
    table = contest.contest(rows, params.load())
    panels = contest.chart_minutes(table).axes
    assert [axes.get_title() for axes in panels] == ["1 labelled", "5 labelled"]
    for axes, labelled in zip(panels, (1, 5)):
        drawn = {line.get_label(): line for line in axes.lines}
        assert {name: line.get_xdata()[0] for name, line in drawn.items()} == {"fs": 1, "fs+elastic": 2, "joint+": 9}
        hollow = {name for name, line in drawn.items() if line.get_markerfacecolor() == "none"}
        assert hollow == {"fs"}
        own = table[table["n_labelled"] == labelled].set_index("method")["dsc_mean"]
        assert drawn[contest.OURS].get_ydata()[0] == pytest.approx(own[contest.OURS])
    assert len(contest.chart_minutes(table[:0]).axes) == 1


def test_a_peer_with_fewer_draws_is_compared_on_those():
    """Its mean is the highest because its only draw is an easy one; joint+ leads it there by more than bcp."""
    rows = scores(["bcp", "mt", contest.OURS], labelled=(1,), level={"mt": -0.01})
    easy = rows.assign(dsc=rows["dsc"] + 0.1 * (rows["seed"] == 1))
    table = contest.contest(easy[(easy["method"] != "mt") | (easy["seed"] == 1)], params.load())
    by_method = table.set_index("method")
    assert by_method["dsc_mean"]["mt"] > by_method["dsc_mean"]["bcp"]
    assert by_method["best_peer"][contest.OURS] == "bcp"
    assert by_method["best_peer_difference"][contest.OURS] == pytest.approx(GAIN)


def test_minutes_are_those_of_the_cpu_where_a_draw_ran_on_one():
    rows = scores(["bcp", contest.OURS], labelled=(1,))
    on_gpu = (rows["seed"] == 2) | (rows["method"] == contest.OURS)
    rows = rows.assign(minutes=rows["minutes"].mask(on_gpu, 0.5), device=rows["device"].mask(on_gpu, "NVIDIA H100"))
    table = contest.contest(rows, params.load()).set_index("method")
    assert table["minutes"].to_dict() == {"bcp": 3.0, contest.OURS: 0.5}
    assert table["device"].to_dict() == {"bcp": "CPU (1 threads)", contest.OURS: "NVIDIA H100"}
    assert "0.5 (GPU)" in contest.markdown(table.reset_index())


def courses(minutes=(1.0, 3.0), seeds=(1, 2)):
    """fs+elastic rises from 0.80 to 0.86, joint+ from 0.78 to 0.90, in five looks; the second draw is 0.02 better."""
    rows = []
    for (method, first, last), each in zip(((contest.OURS, 0.78, 0.90), (contest.BASELINE, 0.80, 0.86)), minutes):
        for seed in seeds:
            for k in range(5):
                dsc = first + (last - first) * k / 4 + 0.02 * (seed == 2)
                rows.append([method, 5, seed, 10 * (k + 1), 160 * (k + 1), each * (k + 1), dsc])
    return pd.DataFrame(rows, columns=methods.COURSE_COLUMNS)


def test_the_time_to_a_mark_is_when_the_mean_of_the_draws_first_reaches_it():
    means = course.of_draws(courses())
    assert list(dict.fromkeys(means["method"])) == [contest.BASELINE, contest.OURS]  # as in the table of methods
    times = course.passed(means, [0.80, 0.86, 0.95]).set_index("method")
    assert times.loc[contest.OURS, ["0.80", "0.86"]].tolist() == [2.0, 4.0]
    assert times.loc[contest.BASELINE, ["0.80", "0.86"]].tolist() == [3.0, 15.0]
    assert times["0.95"].isna().all() and times["draws"].tolist() == [2, 2]
    read = course.markdown(course.passed(means, [0.80, 0.95]))
    assert "DSC 0.95" in read and "not reached" in read and "2.0" in read


def test_a_draw_that_one_method_lacks_does_not_count_in_the_course_of_the_others():
    rows = courses()
    means = course.of_draws(rows[(rows["method"] == contest.OURS) | (rows["seed"] == 1)])
    assert set(means["draws"]) == {1} and means["dsc"].max() == pytest.approx(0.90)


def test_a_number_of_labels_with_a_single_method_has_no_course():
    alone = courses().query("method == @contest.OURS").assign(n_labelled=50)
    means = course.of_draws(pd.concat([courses(), alone]))
    assert set(means["n_labelled"]) == {5} and course.of_draws(alone).empty


def test_the_course_of_every_method_is_drawn_with_the_marks_and_an_empty_one_says_so(tmp_path):
    (axes,) = course.chart(course.of_draws(courses()), [0.85], "c").axes
    drawn = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(drawn) == {contest.OURS, contest.BASELINE}
    assert drawn[contest.OURS].get_ydata()[-1] == pytest.approx(0.91)
    assert axes.lines[-1].get_ydata()[0] == 0.85 and axes.get_title() == "c, 5 labelled"
    course.write_course(params.load(), tmp_path, "c")
    assert "has been watched" in (tmp_path / "course.md").read_text() and (tmp_path / "course.png").exists()
    assert pd.read_csv(tmp_path / "course.csv").columns.tolist() == methods.COURSE_COLUMNS
