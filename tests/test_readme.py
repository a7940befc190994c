import re
import subprocess

import pytest

from lib import params


TABLES = [*sorted(f"{file.parent.name}/{file.name}" for name in ("table1", "summary")
                  for file in params.ROOT.glob(f"results/*/{name}.md")),
          "hippocampus/ablation.md", "hippocampus/paper.md"]


@pytest.mark.parametrize("table", TABLES)
def test_the_readmes_tables_are_the_results(table):
    """Results that were regenerated with other settings differ from the README's, and from git's: then skip."""
    file = params.ROOT / "results" / table
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", file], cwd=params.ROOT).returncode:
        pytest.skip(f"{file} is not the committed one")
    assert file.read_text() in (params.ROOT / "README.md").read_text()


def test_every_link_and_picture_is_there():
    text = (params.ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 10
    for link in links:
        assert (params.ROOT / link).exists(), link


def test_every_module_is_named():
    text = (params.ROOT / "README.md").read_text()
    for file in params.ROOT.glob("lib/[a-z]*.py"):
        assert f"`{file.stem}`" in text, file.name
