"""Tables and numbers of README.md and docs/ are what the result files say."""

import re
import subprocess

import pytest

from lib.methods.table import by_name
from lib.results import contest, pages
from lib.results.pages import ROOT, disagreements, headline, included

ROWS = """method,n_labelled,variant,dsc_mean,p,share,difference
fs,5,,0.90449,0.0004,0.0213,-0.0209
joint+,5,,0.926034,0.012,0.5,0.0215
joint+,5,no pairs,0.92,1.0,1234.5,0.0
fs,50,,0.938,,0.0,0.0
"""


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository of four result files, in place of this one."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "t.csv").write_text(ROWS)
    (tmp_path / "indexed.csv").write_text(",ours\ndsc,0.9232\nwidth,0.3371\n")
    (tmp_path / "b.json").write_text('{"speedup": 2.67854, "runs": [{"seconds": 68}, {"seconds": 261}]}')
    (tmp_path / "t.md").write_text("| a |\n|---|\n| 1 |\n")


@pytest.mark.parametrize(
    "text",
    [
        '0.926<!-- t.csv method=joint+ n_labelled=5 variant="": dsc_mean -->',
        '**0.93**<!-- t.csv method=joint+ n_labelled=5.0 variant="": dsc_mean -->',
        '0.92<!-- t.csv variant="no pairs": dsc_mean -->',
        '1,234.5<!-- t.csv variant="no pairs": share -->',
        "2.1%<!-- t.csv method=fs n_labelled=5: share -->",
        "2 %<!-- t.csv method=fs n_labelled=5: share -->",
        "p < 0.001<!-- t.csv method=fs n_labelled=5: p -->",
        "p &lt; 0.001<!-- t.csv method=fs n_labelled=5: p -->",
        "0.021<!-- t.csv method=fs n_labelled=5: difference --> lower",
        "-0.021<!-- t.csv method=fs n_labelled=5: difference -->",
        "−0.021<!-- t.csv method=fs n_labelled=5: difference -->",
        '+0.022<!-- t.csv method=joint+ variant="": difference -->',
        "0.923<!-- indexed.csv =dsc: ours -->",
        "2.7<!-- b.json: speedup -->, 261<!-- b.json: runs.1.seconds --> s",
    ],
)
def test_a_number_agrees_where_it_is_the_value_rounded(results, text):
    assert disagreements(text) == []


@pytest.mark.parametrize(
    "text, words",
    [
        ('0.927<!-- t.csv method=joint+ variant="": dsc_mean -->', "0.927 is printed, the file says 0.926034"),
        ('0.925<!-- t.csv method=joint+ variant="": dsc_mean -->', "is printed"),
        ("0.926<!-- t.csv method=joint+: dsc_mean -->", "2 rows are selected"),
        ("0.926<!-- t.csv method=mt: dsc_mean -->", "0 rows are selected"),
        ("0.9<!-- t.csv method=mt n_labelled=5 : dsc_mean -->", "0 rows are selected"),
        ("+0.021<!-- t.csv method=fs n_labelled=5: difference -->", "is printed"),
        ('-0.022<!-- t.csv method=joint+ variant="": difference -->', "is printed"),
        ("0.021%<!-- t.csv method=fs n_labelled=5: share -->", "is printed"),
        ('< 0.001<!-- t.csv method=joint+ variant="": p -->', "is printed"),
        ("0.1<!-- t.csv method=fs n_labelled=50: p -->", "could not convert"),
        ("0.9<!-- t.csv n_labelled=50: dsc -->", "there is no 'dsc'"),
        ("0.9<!-- t.csv labels=50: dsc_mean -->", "there is no 'labels'"),
        ("0.9<!-- missing.csv method=fs: dsc_mean -->", "the file is missing"),
        ("0.9<!-- t.csv method=fs n_labelled=50 -->", "no ': column' in it"),
        ("much<!-- t.csv n_labelled=50: dsc_mean -->", "no number stands before it"),
        ("2.8<!-- b.json: speedup -->", "is printed"),
        ("2.7<!-- b.json: speed -->", "there is no 'speed'"),
        ("<!-- table: missing.md -->\n<!-- /table -->", "the file is missing"),
        ("<!-- table: t.md -->\nno end", "has no <!-- /table -->"),
        ("<!-- table: t.md -->\n\n<!-- table: t.md -->\n\n<!-- /table -->", "has no <!-- /table -->"),
    ],
)
def test_what_disagrees_is_named_with_its_mark(results, text, words):
    (sentence,) = disagreements(f"Text before 0.5 and {text} after." if "table" not in text else text)
    assert words in sentence and "<!-- " in sentence


def test_a_renewed_page_is_a_fixed_point_and_keeps_what_is_around_its_tables(results):
    old = "before\n\n<!-- table: t.md -->\nold\n<!-- /table -->\nbetween <!-- a comment -->\n"
    old += "<!-- table: t.md -->\n<!-- /table -->\nafter"
    new = included(old)
    table = "<!-- table: t.md -->\n\n| a |\n|---|\n| 1 |\n\n<!-- /table -->"
    assert new == f"before\n\n{table}\nbetween <!-- a comment -->\n{table}\nafter"
    assert included(new) == new and disagreements(new) == []


def test_a_table_without_its_file_stays_and_is_named(results, capsys):
    text = "<!-- table: missing.md -->\nold\n<!-- /table -->"
    assert included(text) == text
    assert "missing.md is missing" in capsys.readouterr().out


def test_the_command_renews_pages_and_names_wrong_numbers(results, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- table: t.md -->\n<!-- /table -->\n")
    (tmp_path / "docs" / "a.md").write_text("2.7<!-- b.json: speedup -->\n")
    pages.main()
    assert "| 1 |" in (tmp_path / "README.md").read_text() and "a.md" not in capsys.readouterr().out
    (tmp_path / "b.json").write_text('{"speedup": 3.0}')
    pages.main()
    assert "docs/a.md: <!-- b.json: speedup -->" in capsys.readouterr().out


def test_the_headline_has_a_row_per_method_and_a_column_per_number_of_labels():
    head, _, *rows = headline().splitlines()
    methods = [row.split("|")[1].strip() for row in rows]
    assert methods == [name for name in by_name() if name in methods] and contest.OURS in methods
    assert {len(row.split("|")) for row in rows} == {len(head.split("|"))}


@pytest.fixture(scope="session")
def committed(tmp_path_factory):
    """README, docs and results as git has them; this folder where the results are git's, or where there is no git.

    Another kind of CPU gives other last digits: what is regenerated there disagrees with pages that nobody has changed.
    """
    if subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "results"], cwd=ROOT).returncode != 1:
        return ROOT
    folder = tmp_path_factory.mktemp("committed")
    archive = subprocess.run(
        ["git", "archive", "HEAD", "README.md", "docs", "results"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return folder


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in pages.pages()])
def test_this_repositorys_pages_say_what_its_results_say(page, committed, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", committed)
    text = (committed / page).read_text(encoding="utf-8")
    assert disagreements(text) == []
    assert included(text) == text, "python -m lib.results.pages renews the tables"


def test_every_test_that_the_page_on_reliability_names_is_there():
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py"))
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[-2])}
    assert len(named) > 20
    assert [name for name in sorted(named) if not re.search(rf"def test_\w*{name}", tests)] == []
