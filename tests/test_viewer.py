import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from io import BytesIO
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import numpy as np
import papermill
import pytest
import torch
from matplotlib.image import imread
from test_training import made_up_cohort

from lib.methods import experiment, joint, pretraining
from lib.metrics import harden
from lib.results.figures import viewer
from lib.runs import params

WIDGET, PNG = "application/vnd.jupyter.widget-view+json", "image/png"


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """An experiment on ellipses, both networks pre-trained and joint+ trained at scale smoke."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JOINT_OUTPUT", str(tmp_path_factory.mktemp("output")))
        settings = params.load("paper")
        made_up_cohort(classes=("left", "right")).save(params.cohort_file(settings))
        found = experiment.Experiment(settings)
        pretraining.pretrain_segmentation(found)
        pretraining.pretrain_registration(found)
        joint.joint_rounds(found)
        yield found


def layers(case, slice, number):
    """An image as bright as slice and round are high, and a square mask; case b has no true mask."""
    image, mask = np.full((32, 32), (1 + slice + 3 * number) / 10), np.zeros((1, 32, 32))
    mask[:, 8:20, 8:20] = 1
    found = {
        "image": image,
        "prediction": mask,
        "confidence": np.full((32, 32), 0.7),
        "disagreement": 0 * image,
        "segmentation masks": np.stack([mask] * 3),
        "warped masks": np.stack([mask] * 3),
        "displacement": np.zeros((3, 2, 32, 32)),
    }
    return found | ({"true mask": mask} if case == "a" else {})


def view(layers=layers, **changes):
    return viewer.Viewer({"a": 3, "b": 1}, layers, **{"rounds": (0, 1), "classes": ("square",), **changes})


@pytest.mark.parametrize("number", [0, 1])
def test_layers_are_what_the_experiment_gives(trial, number):
    index = int(trial.data.unlabelled[2])
    found = viewer.experiment_layers(trial)(index, number)
    assert set(found) == set(viewer.LAYERS)
    networks, _ = experiment.load_round(trial, number)
    masks = trial.generate(networks, torch.tensor([index]), "", "viewer", index)
    soft = masks.soft[0]
    expected = {
        "image": trial.data.images[index, 0],
        "true mask": trial.data.masks[index],
        "prediction": harden(masks.plain)[0],
        "confidence": torch.cat((1 - soft.sum(0, keepdim=True), soft)).amax(0).clamp(0, 1),
        "disagreement": (masks.segmentation - masks.registration)[0].abs().amax(0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.float().numpy(), atol=1e-5, err_msg=name)
    for name, mean in (("segmentation masks", masks.segmentation), ("warped masks", masks.registration)):
        assert len(found[name]) == trial.settings.pseudo_masks.n
        np.testing.assert_allclose(found[name].mean(axis=0), mean[0].float().numpy(), atol=1e-5, err_msg=name)
    assert found["displacement"].shape == (trial.settings.pseudo_masks.n, 2, 32, 32)


def test_networks_that_agree_do_not_disagree(trial, monkeypatch):
    constant = lambda: torch.full((5, 1, 2, 32, 32), 0.3)
    monkeypatch.setattr(trial, "every_mask", lambda *given: (constant(), constant(), torch.zeros(5, 1, 2, 32, 32)))
    found = viewer.experiment_layers(trial)(0, 0)
    assert (found["disagreement"] == 0).all()
    np.testing.assert_allclose(found["confidence"], 0.4, atol=1e-6)  # of the background: 1 - 2 * 0.3


def test_slices_of_a_subject_are_one_case(trial):
    found = viewer.experiment_viewer(trial, torch.cat((trial.data.unlabelled, trial.data.validation)))
    names = [f"{name} (validation)" for name in dict.fromkeys(trial.cohort.subjects[trial.data.validation])]
    assert [name for name in found.cases if name.endswith("(validation)")] == names
    assert sum(found.cases.values()) == len(trial.data.unlabelled) + len(trial.data.validation)
    found.case.value = names[0]
    np.testing.assert_array_equal(found.layers(names[0], 1, 0)["image"], trial.cohort.images[trial.data.validation[1]])


def test_every_control_draws_the_picture_of_what_is_chosen():
    shown = view()
    assert shown.chosen == ("a", 1, 1) and shown.status.value == "a, slice 2 of 3, round 1: prediction"
    seen = {shown.picture.value}
    for control, value in (
        (shown.slice, 3),
        (shown.round, 0),
        (shown.layer, "confidence"),
        (shown.outlined, False),
        (shown.layer, "displacement"),
        (shown.layer, "all"),
        (shown.case, "b"),
    ):
        control.value = value
        assert shown.picture.value == shown.render(*shown.chosen, shown.layer.value, shown.outlined.value)
        seen.add(shown.picture.value)
    assert len(seen) == 8 and shown.status.value == "b, round 0: all"
    assert shown.slice.layout.display == "none"


def test_a_case_opens_at_its_middle_slice_with_one_picture():
    asked = []
    shown = viewer.Viewer({"long": 9, "short": 2}, lambda *key: asked.append(key) or layers(*key))
    shown.slice.value = 9
    shown.case.value = "short"
    shown.number.value = 0
    assert asked == [("long", 4, 0), ("long", 8, 0), ("short", 0, 0)]  # the fourth is still in memory
    assert shown.round.layout.display == "none"


def test_a_slice_is_computed_once_and_only_when_it_is_looked_at():
    asked = []
    shown = view(lambda *key: asked.append(key) or layers(*key))
    for name in ("image", "all", "warped masks"):
        shown.layer.value = name
    shown.slice.value, shown.slice.value = 1, 2
    assert asked == [("a", 1, 1), ("a", 0, 1)]


def test_an_error_stands_in_the_pictures_place_until_there_is_a_picture_again():
    def broken(case, slice, number):
        if slice == 2:
            raise ValueError("no <such> slice")
        return layers(case, slice, number)

    shown = view(broken)
    shown.slice.value = 3
    assert shown.place.children == (shown.error,) and "ValueError: no &lt;such&gt; slice" in shown.error.value
    with pytest.raises(ValueError, match="no <such> slice"):
        shown.show()
    shown.slice.value = 1
    assert shown.place.children == (shown.picture,)


def test_a_missing_layer_says_so():
    (axes,) = viewer.pictures(layers("b", 0, 0), ["true mask"]).axes
    assert axes.get_title() == "no true mask" and len(axes.images) == 1
    (axes,) = viewer.pictures(layers("a", 0, 0), ["true mask"]).axes
    assert axes.get_title() == "true mask" and len(axes.images) == 2


def test_every_class_has_its_colour_and_nothing_is_left_clear():
    masks = np.zeros((2, 4, 4))
    masks[0, 0], masks[1, 1] = 1, 0.5
    picture = viewer.tinted(masks)
    assert not np.allclose(picture[0, 0, :3], picture[1, 0, :3])
    np.testing.assert_allclose(picture[:, 0, 3], [0.6, 0.3, 0, 0])


def test_without_a_front_end_there_is_a_still_picture(tmp_path):
    source = (
        f"import sys\nsys.path[:0] = {[str(params.ROOT), str(params.ROOT / 'tests')]}\n"
        "from test_viewer import view\nview().show()"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "a.ipynb")
    papermill.execute_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", progress_bar=False)
    outputs = [output.data for output in nbformat.read(tmp_path / "b.ipynb", 4).cells[0].outputs if "data" in output]
    assert [kind for output in outputs for kind in (WIDGET, PNG) if kind in output] == [WIDGET, PNG]
    shown = view()
    assert base64.b64decode(outputs[-1][PNG]) == shown.render(*shown.chosen, "all", True, shown.text)


@pytest.fixture
def lab(trial, tmp_path):
    """Address of JupyterLab on copies of the notebooks with a viewer, which work on the trial's output."""
    (tmp_path / "notebooks").mkdir()
    for name in ("04_joint_training", "11_own_data"):
        shutil.copy(params.ROOT / "notebooks" / f"{name}.ipynb", tmp_path / "notebooks")
    for name in ("lib", "params.yaml"):
        (tmp_path / name).symlink_to(params.ROOT / name)
    for name, value in (
        ("notebook-extension/tracker", {"windowingMode": "none"}),  # all cells are on the page
        ("apputils-extension/notification", {"fetchNews": "false", "checkForUpdates": False}),
    ):
        settings = tmp_path / "lab" / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(value))
    folders = {
        f"{name}_DIR": str(tmp_path / "lab" / part)
        for name, part in (
            ("JUPYTERLAB_SETTINGS", "settings"),
            ("JUPYTERLAB_WORKSPACES", "workspaces"),
            ("JUPYTER_CONFIG", "config"),
            ("JUPYTER_RUNTIME", "runtime"),
        )
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={address.rsplit(':')[-1]}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            command, env=os.environ | folders | {"IPYTHONDIR": str(tmp_path / "lab")}, stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            try:
                urlopen(f"{address}/api/status", timeout=5).close()
                break
            except URLError:
                assert server.poll() is None, (tmp_path / "lab.log").read_text()
                time.sleep(0.2)
        else:
            pytest.fail((tmp_path / "lab.log").read_text())
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def browser(tmp_path):
    """Chromium without a window."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-sync",
        "disable-background-networking",
        "disable-component-update",
        "disable-dev-shm-usage",
        "window-size=1300,1400",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


class Page:
    """A notebook in the browser, and the viewer in it."""

    STATUS = ".viewer-status"
    BYTES = """
        const done = arguments[arguments.length - 1], picture = document.querySelector(".jupyter-widgets img");
        fetch(picture.src).then(found => found.blob()).then(blob => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result.split(",")[1]);
            reader.readAsDataURL(blob);
        });
    """

    def __init__(self, browser, address, notebook):
        self.browser = browser
        browser.get(f"{address}/doc/tree/notebooks/{notebook}.ipynb")
        self.wait(
            lambda: browser.execute_script(
                "const page = window.jupyterapp?.shell.currentWidget; return page?.context?.isReady && "
                "page.sessionContext.isReady && page.sessionContext.session?.kernel?.connectionStatus == 'connected'"
            )
        )
        browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def wait(self, condition, seconds=60):
        """Until ``condition`` holds; a part of the page that is being exchanged is looked up again."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            try:
                if found := condition():
                    return found
            except WebDriverException:
                if time.monotonic() > end:
                    raise
            assert time.monotonic() < end, self.text("body")[-3000:]
            time.sleep(0.1)

    def text(self, selector):
        return self.browser.find_element("css selector", selector).text

    def picture(self):
        """The picture's bytes."""
        return base64.b64decode(self.browser.execute_async_script(self.BYTES))

    def press(self, *keys):
        """Press keys, one after another, on whatever has the focus then."""
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def check(self, expected, seconds=20):
        """Wait for the status and the picture of the Viewer ``expected``."""
        self.wait(lambda: self.text(self.STATUS) == expected.status.value, seconds)
        self.wait(lambda: distance(self.picture(), expected.picture.value) < 0.002, seconds)


def distance(*pictures):
    """Mean difference of two PNGs in [0, 1]; infinite where they are not of one size."""
    first, second = (imread(BytesIO(picture))[..., :3] for picture in pictures)
    return np.abs(first - second).mean() if first.shape == second.shape else np.inf


BROWSER = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="there is no chromium or no chromedriver: apt-get install chromium chromium-driver",
)


@pytest.mark.browser
@BROWSER
def test_own_scans_are_looked_at_one_by_one_in_jupyterlab(trial, lab, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, lab, "11_own_data")
    page.wait(lambda: ": prediction" in page.text(page.STATUS), seconds=180)  # trained and segmented
    seen, named = [page.picture()], [page.text(page.STATUS)]
    browser.find_element("css selector", ".jupyter-widgets select").send_keys(Keys.TAB)  # to the slider of the cases
    for _ in range(2):
        page.press(Keys.ARROW_RIGHT)
        page.wait(lambda: page.text(page.STATUS) not in named, seconds=20)
        page.wait(lambda: all(distance(page.picture(), other) > 0.001 for other in seen), seconds=20)
        seen.append(page.picture())
        named.append(page.text(page.STATUS))
    assert all(name.startswith("scan_") for name in named)
    browser.save_screenshot(str(tmp_path / "own.png"))
    assert "Traceback" not in page.text(".jp-Notebook")


@pytest.mark.browser
@BROWSER
def test_the_keyboard_moves_the_viewer_in_jupyterlab(trial, lab, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    expected = viewer.experiment_viewer(trial, torch.cat((trial.data.unlabelled, trial.data.validation)))
    layers = expected.layer.options
    page = Page(browser, lab, "04_joint_training")
    page.check(expected, seconds=120)  # every cell has run
    browser.find_element("css selector", ".jupyter-widgets select").send_keys(Keys.TAB)  # on to the slider of the cases
    for control, value, keys in (
        (expected.case, list(expected.cases)[1], [Keys.ARROW_RIGHT]),
        (expected.slice, 2, [Keys.TAB, Keys.ARROW_RIGHT]),  # whose number can be typed, too: one more Tab
        (expected.round, 0, [Keys.TAB, Keys.TAB, Keys.ARROW_LEFT]),
        (expected.layer, "warped masks", [*[Keys.TAB] * (2 + layers.index("warped masks")), Keys.ENTER]),
        (expected.outlined, False, [Keys.TAB, Keys.TAB, Keys.SPACE]),
    ):
        before = expected.picture.value
        control.value = value
        assert distance(before, expected.picture.value) > 0.004
        page.press(*keys)
        page.check(expected)
    browser.save_screenshot(str(tmp_path / "viewer.png"))
    assert "Traceback" not in page.text(".jp-Notebook")
