"""One display over a whole run: it ends when everything is done, and its parts add up."""

import json

import nbformat
import pytest
from nbclient import NotebookClient
from test_own import SLICES, settings_for

from lib.runs import params
from lib.scans.networks.training import fold_settings, seen_by
from lib.scans.progress import PIXEL, SEGMENTING, Progress, network_name, parts_of
from lib.scans.reading.planning import Plan

VOLUMES = Plan("volumes", 2, (1.0, 1.0, 1.0), (8, 8, 8))
POSITIONS = {"a": 30, "b": 30, "c": 10}  # slices


def parts_for(tmp_path, monkeypatch, folds, plans=(SLICES,), **options):
    settings = settings_for(tmp_path, monkeypatch, **options)
    each = [seen_by(k, plans) for k in range(max(1, len(folds)))]
    trainings = [[fold_settings(settings, plan, k).strong.training for plan in each[k]] for k in range(len(folds))]
    seen = lambda count: [range(1 if plan is VOLUMES else count) for plan in plans]
    return parts_of(settings, each, trainings, folds, {name: seen(count) for name, count in POSITIONS.items()})


def test_parts_are_networks_and_segmentation_and_take_what_they_do(tmp_path, monkeypatch):
    parts = parts_for(tmp_path, monkeypatch, [(), ("a",), ("b",)])
    quick = ["quick network 1", "cases held out from quick network 1"]
    again = [name.replace("1", "2") for name in quick]
    assert list(parts) == ["network", "cases held out from the network", *quick, *again, SEGMENTING]
    assert parts["cases held out from the network"] == 0 and parts[quick[1]] > parts[SEGMENTING]  # also in worse views
    assert [parts[name] for name in quick] == [parts[name] for name in again]
    assert parts[SEGMENTING] == 2 * 70 * PIXEL * 32 * 32  # two views
    longer = parts_for(tmp_path, monkeypatch, [()], method="joint+")
    assert longer["network"] > parts["network"] > 0
    assert list(parts_for(tmp_path, monkeypatch, [])) == [SEGMENTING]  # a model is given


def test_slices_of_all_directions_are_three_networks_that_all_segment(tmp_path, monkeypatch):
    plans = SLICES, *(SLICES._replace(axis=axis, canvas=(16, 32)) for axis in (0, 1))
    parts = parts_for(tmp_path, monkeypatch, [(), ("a",)], plans)
    names = [f"network of {view} slices" for view in ("axial", "sagittal", "coronal")]
    assert list(parts)[:3] == names and parts[names[0]] == 2 * parts[names[1]] == 2 * parts[names[2]]
    alone = parts_for(tmp_path, monkeypatch, [(), ("a",)])  # quick networks see one direction
    quick = "quick network 1", "cases held out from quick network 1"
    assert list(parts)[4:6] == [*quick] and all(parts[name] == alone[name] for name in quick)
    assert parts[SEGMENTING] == 2 * parts_for(tmp_path, monkeypatch, [])[SEGMENTING]
    longer = parts_for(tmp_path, monkeypatch, [()], plans, method="joint+")
    assert all(longer[name] > parts[name] for name in names)


def test_a_volume_takes_what_its_voxels_do(tmp_path, monkeypatch):
    assert parts_for(tmp_path, monkeypatch, [], [VOLUMES])[SEGMENTING] == 2 * 3 * 8**3


def test_the_bar_is_full_at_the_end_whatever_its_parts_say_they_have_done(capsys):
    progress = Progress()
    progress.begin({"network": 100, "segmenting": 20})
    with progress.part("network") as done:
        for _ in range(50):
            done(1)  # half of it: the rest was done before a stop
    assert progress.bar.n == 100
    with progress.part("segmenting") as done:
        done(500)
        assert progress.bar.n == 120
    assert "100 %" in capsys.readouterr().err.split("\r")[-1]


def test_stages_share_a_bar_and_what_was_guessed_of_the_later_one_is_put_right(capsys):
    progress = Progress()
    progress.begin({"network": 60, SEGMENTING: 40}, "coarse view: ", later=300)
    with progress.part("network"):
        assert "coarse view: network" in str(progress.bar)
    assert progress.bar.n == 60 and progress.bar.total == 400
    progress.begin({"network": 90, SEGMENTING: 10})  # segmenting was left out: nothing of it is waited for
    assert progress.bar.n == 60 and progress.bar.total == 160
    for name in ("network", SEGMENTING):
        with progress.part(name):
            assert "coarse" not in str(progress.bar)
    assert progress.bar.n == progress.bar.total
    assert "100 %" in capsys.readouterr().err.split("\r")[-1]


def test_what_an_earlier_run_has_done_is_not_waited_for(capsys):
    names = network_name(0, SLICES, [SLICES]), network_name(1, SLICES, [SLICES])
    progress = Progress()
    progress.begin(dict(zip((*names, SEGMENTING), (100, 50, 20))))
    progress.skip(*names)
    assert progress.bar.total == 20 and list(progress.parts) == [SEGMENTING]
    with pytest.raises(KeyError), progress.part("network"):
        pass


def test_in_a_notebook_the_display_leaves_the_line_to_the_bar_of_a_single_training():
    """Bars below one another would be a line of output for every update."""
    source = (
        "from tqdm import tqdm\nfrom lib.scans.progress import Progress\n"
        "progress = Progress()\nprogress.begin({'network': 30})\n"
        "with progress.part('network') as done:\n"
        "    for _ in tqdm(range(30), mininterval=0):\n        done(1)\n"
        "widget = progress.bar.container.children[1]\nends = [widget.layout.width, widget.max]\n"
        "progress.begin({'quick network': 20, 'segmenting': 50}, later=7)\nends.append(widget.max)\n"
        "progress.skip('quick network')\n[*ends, widget.max]\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(params.ROOT)}}).execute()
    shown, *streams, last = notebook.cells[0].outputs
    assert json.loads(last["data"]["text/plain"].replace("None", "null")) == [None, 30, 107, 87]  # of the widget itself
    text = "".join(stream["text"] for stream in streams)
    assert "application/vnd.jupyter.widget-view+json" in shown["data"] and "100%" in text
    assert text.count("\n") <= 1 and "all:" not in text
