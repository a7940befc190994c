import re

import pytest

from lib.results.pages import pages
from lib.runs.params import ROOT

PAGES = [*pages(), ROOT / "CONTRIBUTING.md"]


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page):
    links = re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if not link.startswith("https://")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_front_page_is_one_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) < 20_000 and text.count("\n") < 300
    headline = text[text.index("<!-- table: headline -->") :]
    rows = [line for line in headline[: headline.index("<!-- /table -->")].splitlines() if line.startswith("|")]
    assert 2 < len(rows) <= 2 + 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:lib|notebooks|tests|results)/[\w/.\-]+\.(?:py|ipynb|csv|json|md|png))`", text))
    named |= {f"{match.replace('.', '/')}" for match in re.findall(r"python -m (lib(?:\.\w+)+)", text)}
    for name in named:
        found = [ROOT / name, (ROOT / name).with_suffix(".py"), ROOT / name / "__main__.py"]
        assert any(file.is_file() for file in found), name


def test_every_target_of_the_makefile_that_a_page_names_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        named = re.findall(r"(?:^|`)make (\w+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for target in named:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (page.name, target)
