import json

from lib.runs import bench, params


def test_the_benchmark_measures_both_ways_and_writes_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JOINT_OUTPUT", str(tmp_path))
    (tmp_path / "results").mkdir()
    for name, value in {"SIDE": 32, "BATCH": 2, "REPEATS": 1, "TURNS": 1, "VOLUME": (16, 16, 16)}.items():
        monkeypatch.setattr(bench, name, value)
    bench.main()
    found = json.loads((params.output_root() / "results" / "bench.json").read_text())
    for name in bench.LABELS:
        assert found[f"{name}_speedup"] > 0 and found[f"{name}_seconds"] > 0
    assert found["seg_loss_difference"] <= 0.02 and found["reg_loss_difference"] <= 0.02
    assert "MrRegNet, training" in capsys.readouterr().out
