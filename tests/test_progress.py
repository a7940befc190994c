"""One display over a whole run: it ends when everything is done, and its parts add up."""

import pytest
from test_own import SLICES, settings_for

from lib.scans.networks.training import fold_settings
from lib.scans.progress import SEGMENTING, Progress, network_name, parts_of


def parts_for(tmp_path, monkeypatch, folds, **options):
    settings = settings_for(tmp_path, monkeypatch, **options)
    trainings = [fold_settings(settings, SLICES, number).strong.training for number in range(len(folds))]
    return parts_of(settings, trainings, folds, {"a": 30, "b": 30, "c": 10})


def test_parts_are_networks_and_segmentation_and_take_what_they_do(tmp_path, monkeypatch):
    parts = parts_for(tmp_path, monkeypatch, [(), ("a",), ("b",)])
    assert list(parts) == ["network", "quick network 1", "quick network 2", SEGMENTING]
    assert parts["quick network 1"] == parts["quick network 2"] and parts[SEGMENTING] == 2 * 70
    longer = parts_for(tmp_path, monkeypatch, [()], method="joint+")
    assert longer["network"] > parts["network"] > 0
    assert list(parts_for(tmp_path, monkeypatch, [])) == [SEGMENTING]  # a model is given


def test_the_bar_is_full_at_the_end_whatever_its_parts_say_they_have_done(capsys):
    progress = Progress({"network": 100, "segmenting": 20})
    with progress.part("network") as done:
        for _ in range(50):
            done(1)  # half of it: the rest was done before a stop
    assert progress.bar.n == 100
    with progress.part("segmenting") as done:
        done(500)
        assert progress.bar.n == 120
    assert "100 %" in capsys.readouterr().err.split("\r")[-1]


def test_what_an_earlier_run_has_done_is_not_waited_for(capsys):
    progress = Progress({network_name(0): 100, network_name(1): 50, SEGMENTING: 20})
    progress.skip(network_name(0), network_name(1))
    assert progress.bar.total == 20 and list(progress.parts) == [SEGMENTING]
    with pytest.raises(KeyError), progress.part("network"):
        pass
