import json
import pickle
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib import DataError
from lib.models import ResidualUNet, strides_of
from lib.scans.networks.model_file import FORMAT, VERSION, Model, load_model, save_model

ABOUT = {
    "classes": ["a", "b"],
    "values": [1, 5],
    "plans": [
        {"space": "volumes", "axis": 2, "spacing": [1.0] * 3, "canvas": [32] * 3, "root": 4},
        {"space": "slices", "axis": 0, "spacing": [1.0] * 2, "canvas": [32] * 2, "root": 16},
    ],
    "channels": [""],
    "normalisation": "instance",
    "pseudo_masks": {"n": 5},
    "symmetric": False,
    "fingerprint": "x",
    "licence": "",
    "calibration": [],
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    networks = ResidualUNet(2, "instance", 4, strides_of((1.0,) * 3, (32,) * 3)), ResidualUNet(2, "instance", 16)
    return Model([network.eval() for network in networks], ABOUT)


def test_a_model_survives_its_file(model, tmp_path):
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert again.about == ABOUT and len(again.networks) == 2
    for mine, theirs, plan in zip(model.networks, again.networks, again.plans, strict=True):
        image = torch.rand(1, 1, *plan.canvas)
        assert torch.equal(mine.segment(image), theirs.segment(image)) and not theirs.training


@pytest.fixture
def small(model):
    """The network of slices alone."""
    return Model(model.networks[1:], {**ABOUT, "plans": ABOUT["plans"][1:]})


def pickled(file):
    file.write_bytes(pickle.dumps({"about": ABOUT}))


def rewrite(plan=(), **about):
    """A file with a network of slices; what is given is changed in its plan, or beside it."""

    def spoil(file):
        network = ResidualUNet(2, "instance")
        plans = [{**ABOUT["plans"][1], **dict(plan)}]
        save_file(
            {f"0/{name}": value for name, value in network.state_dict().items()},
            file,
            {"about": json.dumps({**ABOUT, "plans": plans, "format": FORMAT, "version": VERSION, **about})},
        )

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "cut short"),
        (lambda f: f.write_bytes(b""), "not a model file"),
        (pickled, "not a model file"),
        (lambda f: torch.save({"weights": torch.zeros(3)}, f), "not a model file"),
        (lambda f: save_file({"x": torch.zeros(3)}, f), "not a model of this project"),
        (rewrite(version=99), "version 99"),
        (rewrite(classes=["a", "b", "c"]), "does not fit"),
        (rewrite(), "has changed since it was written"),
        (rewrite(plans=[]), "no network"),
        (rewrite(plans=["slices"]), "does not fit"),
        (rewrite({"canvas": 32}), "does not fit.*int"),
        (rewrite({"space": "time"}), "space is 'time'"),
        (rewrite({"root": 8}), "does not fit.*size mismatch"),
        (lambda f: f.unlink(), "does not exist"),
    ],
)
def test_what_is_no_model_is_refused_and_named(model, tmp_path, spoil, words):
    file = tmp_path / "m.safetensors"
    save_model(model, file)
    spoil(file)
    with pytest.raises(DataError, match=f"(?s)m.safetensors.*{words}"):
        load_model(file)


def test_the_same_model_has_the_same_bytes(model, tmp_path):
    for k in range(6):
        save_model(model, tmp_path / f"{k}.safetensors")
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    places=st.lists(st.tuples(st.one_of(st.floats(0, 0.01), st.floats(0, 0.999)), st.integers(0, 255)), max_size=4),
    text=st.tuples(st.integers(0, 600), st.sampled_from([b"", b"[", b"9", b'"', b"null", b"1e999"])),
    keep=st.sampled_from([1, 1, 1, 0.999, 0.01, 0.0001]),
)
def test_whatever_is_in_a_model_file_it_is_the_model_or_refused_by_name(small, tmp_path, places, text, keep):
    file = tmp_path / "m.safetensors"
    save_model(small, file)
    content = bytearray(file.read_bytes())
    begin = content.index(b"{") + text[0]
    content[begin : begin + len(text[1])] = text[1]
    for place, value in places:
        content[int(place * len(content))] = value
    file.write_bytes(content[: int(keep * len(content))])
    try:
        found = load_model(file)
    except DataError as error:
        assert "m.safetensors" in str(error)
    else:
        assert found.about == small.about and found.key == small.key


def test_a_full_disk_leaves_the_old_model(model, tmp_path):
    file = tmp_path / "m.safetensors"
    save_model(model, file)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="m.safetensors cannot be written .*File too large"):
            save_model(model, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    with torch.no_grad():
        next(model.networks[1].parameters()).fill_(float("nan"))
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="not finite"):
        load_model(tmp_path / "m.safetensors")


def test_an_interrupted_write_leaves_the_old_model(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError):
        save_model(model, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
