"""The cells of every notebook run (in its fast mode), and the committed output is of a run without errors."""

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


# The cells, in a process that has imported everything: a kernel of its own would take seconds to start, and `make test-docs` uses one.
_CELLS = """
import json, os
os.chdir({folder!r})
os.environ["LIGHTNING_UQ_FAST"] = "1"
import matplotlib.pyplot as plt
plt.switch_backend("agg")
shown, names = [], {{"__name__": "__main__"}}
plt.show = lambda *args, **kwargs: (shown.extend(plt.get_fignums()), plt.close("all"))
for number, source in enumerate({cells!r}, 1):
    exec(compile(source, f"{name}, cell {{number}}", "exec"), names)
    plt.show()
open(out, "w").write(json.dumps(len(shown)))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_in_fast_mode(path, run_script):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert run_script(_CELLS.format(folder=str(FOLDER), name=path.name, cells=cells)) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_committed_output_is_whole(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if output.get("data", {}).get("image/png")]
    text = path.read_text()
    assert str(Path.home()) not in text
    assert "site-packages" not in text  # a warning, or a path of the machine that ran it


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_has_the_parts_of_every_notebook(path):
    """What it is for, what it costs and when not to use it; the common style; a caption below each figure; where to read on."""
    cells = nbformat.read(path, as_version=4).cells
    for part in ("What it is for", "What it costs", "When not to use it"):
        assert f"- **{part}.** " in cells[0].source, part
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert 'plt.style.use("figures.mplstyle")' in code
    assert not re.search(r"['\"](?:/|~|[A-Z]:\\)[\w/]", code), "a path outside the clone"
    assert "../docs/" in cells[-1].source
    number = 0
    for cell, below in zip(cells, [*cells[1:], None], strict=True):
        for output in cell.get("outputs", []):
            if output.get("data", {}).get("image/png"):
                number += 1
                assert below.source.startswith(f"*Figure {number}. "), f"figure {number} has no caption"
                assert len(below.source) > 60
    captions = sum(cell.source.startswith("*Figure ") for cell in cells)
    assert number == captions, "a caption has no figure: run `make notebooks`"
    for target in re.findall(
        r"\]\(([^):]+?)(?:#[^)]*)?\)", "\n".join(c.source for c in cells if c.cell_type == "markdown")
    ):
        assert (path.parent / target).exists(), target
