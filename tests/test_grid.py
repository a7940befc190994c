import json
import subprocess
from contextlib import contextmanager

import pandas as pd
import pytest
from distributed import Client

from lib.results import collecting, grid
from lib.runs import params


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    settings = params.load()
    settings.grid |= {"rates": [1, 10, 100], "seeds": [1, 2]}
    return settings


def names(groups):
    return [[item.name for item in group] for group in groups]


def test_groups_share_a_registration_and_leave_out_what_the_pipeline_runs(settings):
    assert names(grid.groups_of(settings)) == [
        ["paper-10-seed_1", "paper-100-seed_1"],
        ["paper-1-seed_2", "paper-10-seed_2", "paper-100-seed_2"],
    ]
    settings.grid |= {"rates": [], "seeds": []}
    assert grid.groups_of(settings) == []  # at the pipeline's own rate and seed


def test_where_the_data_lie_and_what_computes_do_not_repeat_an_item(settings, monkeypatch):
    settings.cohort = "hippocampus"
    item = grid.Item("paper", 10, 2)
    monkeypatch.setenv("JOINT_SET", "scale=smoke")
    before = grid.key_of(item, settings)
    monkeypatch.setenv("JOINT_SET", "scale=smoke,device=cpu,hippocampus.folder=elsewhere")
    assert grid.key_of(item, settings) == before
    monkeypatch.setenv("JOINT_SET", "scale=smoke,precision=float32")
    assert grid.key_of(item, settings) != before


def test_untrained_methods_run_once_a_rate_and_seed_beside_the_papers(settings, monkeypatch):
    asked = []
    monkeypatch.setattr(
        grid.cluster,
        "process",
        lambda command, _: (
            asked.append(command[command.index("untrained") + 1]) if "untrained" in command else None,
            subprocess.CompletedProcess(command, 1, "", ""),
        )[1],
    )
    monkeypatch.setattr(grid, "notebooks_of", lambda item: ["08_evaluation"])
    for item in (grid.Item("paper", 10, 1), grid.Item("paper", 100, 1), grid.Item("strong", 1, 1, "", "bcp")):
        with pytest.raises(RuntimeError):
            grid.run(item, settings, 1, {})
    assert asked == ["true", "false", "false"]


def test_everything_labelled_leaves_only_fs():
    assert grid.notebooks_of(grid.Item("paper", 100, 1)) == ["02_pretrain_segmentation", "08_evaluation"]
    assert grid.notebooks_of(grid.Item("paper", 10, 1)) == [
        "02_pretrain_segmentation",
        "03_pretrain_registration",
        "04_joint_training",
        "05_mean_teacher",
        "08_evaluation",
    ]


def test_settings_of_other_methods_and_cohorts_do_not_repeat_an_item(settings):
    items = grid.Item("paper", 10, 2), grid.Item("strong", 10, 1, "with contrast", "cctr")
    before = [grid.key_of(item, settings) for item in items]
    for change, changed in (
        ("strong.bcp.share=0.5,hippocampus.classes=two", [False, False]),
        ("cctr.width=24,refinement.control_points=8", [False, True]),
        ("mean_teacher.decay=0.9", [True, False]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JOINT_SET", f"scale=smoke,{change}")
            after = [grid.key_of(item, params.load()) for item in items]
        assert [old != new for old, new in zip(before, after)] == changed


@contextmanager
def workers_here(settings, workers, patience=0):
    """Stands for cluster.connect: workers that are threads of this process, so that they see what is patched."""
    with Client(processes=False, n_workers=1, threads_per_worker=workers, dashboard_address="127.0.0.1:0") as client:
        yield client


def fake_run(fails=()):
    """Stands for lib.runs.notebooks: writes what notebook 8 would write, and fails where told to."""
    calls = []

    def run(command, _):
        given = command[command.index("--to") + 2 :]
        values = {key: json.loads(value) for key, value in zip(given[1::3], given[2::3])}
        name = "{recipe}-{rate}-{seed}".format(**values)
        calls.append((name, command[command.index("run") + 1]))
        if "destination" in values and name not in fails:
            folder = params.Path(values["destination"])
            folder.mkdir(parents=True)
            (folder / "per_image.csv").write_text("made up\n")
        failed = name in fails
        return subprocess.CompletedProcess(command, int(failed), "", "a traceback" if failed else "")

    return run, calls


def test_a_failing_item_does_not_stop_the_others_and_finished_ones_are_not_run_again(settings, monkeypatch, capsys):
    monkeypatch.setattr(grid.params, "load", lambda *a, **k: params.section(json.loads(json.dumps(settings))))
    monkeypatch.setattr(grid.cluster, "connect", workers_here)
    run, calls = fake_run(fails=["paper-10-1"])
    monkeypatch.setattr(grid.cluster, "process", run)
    assert grid.main() == 1
    said = capsys.readouterr().err
    assert "paper-10-seed_1" in said and "can be watched at http" in said and "1 of 5 items failed" in said
    (log,) = params.work_folder("notebooks").rglob("*.log")
    assert str(log) in said and log.read_text() == "a traceback"
    order = [name for name, notebook in calls if notebook == "03_pretrain_registration"]
    assert sorted(order) == ["paper-1-2", "paper-10-1"]  # once for all items of a seed
    done = [item for group in grid.groups_of(settings) for item in group if grid.is_done(item, settings)]
    assert len(done) == 4
    run, calls = fake_run()
    monkeypatch.setattr(grid.cluster, "process", run)
    assert grid.main() == 0
    assert {name for name, _ in calls} == {"paper-10-1"}
    monkeypatch.setattr(grid.cluster, "connect", None)  # nothing is left: no worker is started
    assert grid.main() == 0 and "all 5 items are done" in capsys.readouterr().out
    settings.pseudo_masks["n"] = 7  # other settings: everything is to be done anew
    assert not any(grid.is_done(item, settings) for item in done)


def test_an_item_whose_registration_fails_says_so_and_the_others_go_on(settings, monkeypatch, capsys):
    monkeypatch.setattr(grid.params, "load", lambda *a, **k: params.section(json.loads(json.dumps(settings))))
    monkeypatch.setattr(grid.cluster, "connect", workers_here)
    run, _ = fake_run()

    def failing(command, environment):
        if "03_pretrain_registration" in command and command[-1] == "2":  # the seed
            return subprocess.CompletedProcess(command, 1, "", "no memory")
        return run(command, environment)

    monkeypatch.setattr(grid.cluster, "process", failing)
    assert grid.main() == 1
    assert capsys.readouterr().err.count("no memory") == 2
    done = [item.name for group in grid.groups_of(settings) for item in group if grid.is_done(item, settings)]
    assert done == ["paper-10-seed_1", "paper-100-seed_1", "paper-100-seed_2"]  # at 100 % none is needed


def test_results_of_a_worker_with_another_folder_come_back(settings):
    item = grid.Item("paper", 10, 1)
    marker = json.dumps({**item._asdict(), "key": grid.key_of(item, settings)}).encode()
    files = {"item.json": marker, "per_image.csv": b"dsc\n0.5\n"}
    grid.keep(item, settings, files)
    folder = grid.folder_of(item, settings)
    assert grid.is_done(item, settings) and (folder / "per_image.csv").read_bytes() == files["per_image.csv"]
    grid.keep(item, settings, {**files, "per_image.csv": b"other"})  # they are there: the folder is shared
    assert (folder / "per_image.csv").read_bytes() == files["per_image.csv"]


def result(folder, seed, dsc):
    folder.mkdir(parents=True)
    row = {
        "cohort": "c",
        "recipe": "paper",
        "rate": 1,
        "n_labelled": 5,
        "seed": seed,
        "variant": "",
        "method": "fs",
        "subject": "007",
        "slice": 3,
        "class": "x",
        "dsc": dsc,
    }
    for name in ("per_image", "reliability", "rounds"):
        pd.DataFrame([row]).to_csv(folder / f"{name}.csv", index=False)


def finish(folder, item, settings):
    (folder / "item.json").write_text(json.dumps({**item._asdict(), "key": grid.key_of(item, settings)}))


def test_the_pipelines_own_results_take_precedence_over_the_grids(settings, tmp_path, monkeypatch, capsys):
    grid_folder = tmp_path / "results" / "grid" / settings.cohort
    result(grid_folder / "paper-1-seed_1", 1, 0.5)
    result(grid_folder / "paper-1-seed_2", 2, 0.6)
    result(tmp_path / "results" / settings.cohort / "items" / "1-seed_1", 1, 0.9)
    finish(grid_folder / "paper-1-seed_1", grid.Item("paper", 1, 1), settings)
    finish(grid_folder / "paper-1-seed_2", grid.Item("paper", 1, 2), settings)
    per_image, _, _ = collecting.collect(settings)
    assert per_image.set_index("seed")["dsc"].to_dict() == {1: 0.9, 2: 0.6}
    assert per_image["subject"].tolist() == ["007", "007"]
    with monkeypatch.context() as patch:
        patch.setenv("JOINT_SET", "scale=smoke,pseudo_masks.n=7")  # these would not come out of such settings
        assert collecting.collect(params.load())[0]["seed"].tolist() == [1]
    assert "of other settings or code" in capsys.readouterr().out
    (grid_folder / "paper-1-seed_2" / "item.json").unlink()  # it has not finished
    assert collecting.collect(settings)[0]["seed"].tolist() == [1]
