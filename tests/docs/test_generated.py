"""What the site generates: references, tables of methods, lists of names."""

import inspect
import re
from pathlib import Path

import pytest

import lightning_uq
from docs.generate import api, bibliography, chooser, evidence, notebooks, repository
from lightning_uq.compare.planning.discovery import methods
from lightning_uq.tasks.names import TASKS

ROOT = Path(__file__).parents[2]
TEXTS = [*(ROOT / "docs").glob("*/*.md"), *(ROOT / "docs").glob("[!R]*.md"), *(ROOT / "lightning_uq").rglob("*.py")]


def test_every_citation_has_an_entry():
    keys, entries = set(bibliography.references()), bibliography.preprints()
    unknown, missing = {}, {}
    for path in TEXTS:
        cited, preprints = bibliography.cited(path.read_text())
        unknown |= dict.fromkeys(cited - keys, path.name)
        missing |= dict.fromkeys(preprints - set(entries), path.name)
    assert not unknown, "docs/references.bib lacks these keys"
    assert not missing, "docs/references.bib lacks these arXiv numbers"


def test_every_entry_is_read():
    text = bibliography.FILE.read_text()
    assert len(re.findall(r"^@", text, flags=re.MULTILINE)) == len(bibliography.references())
    page = bibliography.page()
    assert all(f'id="{key}"' in page for key in bibliography.references())


def test_citations_become_links_outside_code_and_tags():
    html = '<p title="[@osband2018]">As in [@osband2018; @rahaman2021] and arXiv 1612.01474.</p><code>[@osband2018] arXiv 1612.01474</code>'
    linked = bibliography.link(html, "../references.html", "page.md")
    assert linked == (
        '<p title="[@osband2018]">As in [<a href="../references.html#osband2018">Osband et al., 2018</a>; <a href="../references.html#rahaman2021">Rahaman and Thiery, 2021</a>] and '
        '<a href="../references.html#lakshminarayanan2017">arXiv 1612.01474</a>.</p><code>[@osband2018] arXiv 1612.01474</code>'
    )
    with pytest.raises(ValueError, match=r"page\.md cites 'nobody1900'"):
        bibliography.link("<p>[@nobody1900]</p>", "", "page.md")


def test_the_table_has_every_method_and_its_tasks():
    found = {row.name: set(row.tasks) for row in chooser.rows()}
    assert found == {name: {t for t in TASKS if name in methods(t)} for task in TASKS for name in methods(task)}
    html = chooser.table()
    assert all(f"<code>{name}</code>" in html for name in found)


def test_the_costs_and_scores_are_those_of_the_readme():
    demo = chooser.demo()
    ensemble = next(row for row in chooser.rows() if row.name == "ensemble")
    assert ensemble.costs["parameters"] == 5
    assert set(demo["digits"]) == set(methods())
    text = (ROOT / "README.md").read_text()
    for name, row in demo["digits"].items():
        assert re.search(rf"^\| {name} \|.*{re.escape(row['NLL'])}.*{re.escape(row['ms/1k'])} \|$", text, re.MULTILINE)
    page = chooser.page_table(ROOT / "docs" / "methods" / "ensemble.md")
    assert "| `ensemble` | 5 × |" in page
    assert "(../results.md)" in page


def test_ddp_is_read_from_the_contract():
    assert chooser.runs_under_ddp(ROOT / "docs" / "methods" / "ensemble.md") == "yes"
    contract = (ROOT / "docs" / "contract.md").read_text()
    columns = re.findall(r"^\| \|.*", contract, flags=re.MULTILINE)
    assert all(" ddp " in line for line in columns[:2])


def test_the_evidence_counts_the_results():
    """On every set of the page's table the ensemble has the lower NLL; on one, naval, by less than two standard errors."""
    table = (ROOT / "docs" / "results.md").read_text().split("<!-- uci -->")[1].split("| NLL |")[1].split("\n\n")[0]
    rows = [line.split("|") for line in table.splitlines()[2:]]
    cells = [(float(row[4].split()[0]), float(row[5].split()[0])) for row in rows]
    most = sum(a <= b for a, b in cells)
    assert len(rows) == most == 9
    count, sets = map(int, re.findall(r"(\d+) of (\d+) sets", evidence.of("ensemble"))[0])
    assert (count, sets) == (most - 1, len(rows))
    assert evidence.of("softmax") == ""


def test_the_evidence_of_detectors_counts_the_sets_of_their_tables():
    page = (ROOT / "docs" / "results.md").read_text()
    table = page.split("<!-- cifar -->")[1].split("| plain: AUROC / FPR95 |")[1].split("\n\n")[0]
    auroc = {
        row[1].strip(): [float(cell.split("/")[0]) for cell in row[2:6]]
        for row in (line.split("|") for line in table.splitlines()[2:])
    }
    for method, score in {
        "knn": "knn",
        "density": "gmm_combined",
        "relative_mahalanobis": "relative_mahalanobis",
    }.items():
        better = sum(a > b for a, b in zip(auroc[score], auroc["predictive_entropy"], strict=True))
        assert f"on {better} of 4 sets" in evidence.of(method), method
    assert "on 4 of 4 sets" in evidence.of("ddu")


def test_the_evidence_of_joint_predictions_is_that_of_the_testbed():
    """It counts all problems of the page's table."""
    better, problems = map(int, re.findall(r"(\d+) of (\d+) problems", evidence.of("epinet"))[0])
    table = (ROOT / "docs" / "results.md").read_text().split("<!-- testbed -->")[1]
    assert sum(int(number) for number in re.findall(r"\| d = \d+ \| (\d+) \|", table)) == problems
    assert problems / 2 < better <= problems
    assert evidence.of("hypermodel").startswith("Neural Testbed: lower KL of ten labels")


def test_links_are_the_same_in_the_repository_and_in_the_site():
    assert repository.relink("[a](../CONTRIBUTING.md#x)", "compare.md") == "[a](repository/CONTRIBUTING.md#x)"
    assert repository.relink("[a](docs/contract.md)", "repository/CONTRIBUTING.md") == "[a](../contract.md)"
    assert repository.relink("[a](../choose.md)", "methods/ensemble.md") == "[a](../choose.md)"
    assert repository.relink("[a](https://arxiv.org)", "compare.md") == "[a](https://arxiv.org)"


def test_the_names_of_the_package_have_a_first_line():
    page = api.pages()["api/index.md"]()
    for name in lightning_uq.__all__:
        if not inspect.ismodule(getattr(lightning_uq, name)):
            assert re.search(rf"^\| (?:<a id=\"[\w.]+\"></a>)?\[`{name}`\]\[[\w.]+\] \| \S", page, re.MULTILINE), name


def test_every_methods_paper_is_among_the_references():
    links = {entry.link.lower() for entry in bibliography.references().values()}
    missing = {m.link for task in TASKS for m in methods(task).values() if m.link and m.link.lower() not in links}
    assert not missing


def test_docstrings_become_markdown():
    text = "See :class:`~lightning_uq.tasks.Task` and :meth:`fit`, as in::\n\n    f(x)\n\nExample:\n    >>> 1\n    1"
    assert api.readable(text) == ("See `tasks.Task` and `fit`, as in:\n\n    f(x)\n\nExamples:\n    >>> 1\n    1")


def test_every_method_of_a_comparison_has_a_page():
    assert not {row.name for row in chooser.rows() if row.page is None}


def test_pages_of_methods_have_the_same_parts():
    parts = ["Formula", "Example", "Arguments that matter", "Cost and evidence", "Limits", "Citation"]
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    for path in chooser.PAGES:
        text = path.read_text()
        if path.name == "index.md":
            continue
        assert (f"]({path.name})" if path.parent.name == "methods" else f"](../{path.name})") in index, path
        assert re.search(r"^!\[.{40,}\]\((\.\./)?figures/\w+\.svg\)$", text, re.MULTILINE), path
        assert "[@" in text.split("\n## Citation\n")[1], path
        if path.parent.name == "methods":
            assert re.findall(r"^## (.*)$", text, re.MULTILINE) == parts, path
            assert chooser.runs_under_ddp(path) in ("yes", "partly")


def test_the_gallery_shows_every_figure_of_every_notebook():
    gallery, files = notebooks.gallery(), notebooks.files()
    for name in notebooks.notebooks():
        assert f"]({name}.md)" in gallery
        page = notebooks.page(name)
        for shown in notebooks.figures(name):
            assert shown.caption in gallery
            assert f"({Path(shown.path).name})" in page
            assert files[shown.path]().startswith(b"\x89PNG")
    assert repository.relink("[a](../docs/tasks.md)", "notebooks/01_a.md") == "[a](../tasks.md)"
