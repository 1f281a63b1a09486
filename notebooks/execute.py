"""Execute the notebooks in place, in full, and keep their output: ``make notebooks``."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path, timeout: int = 1200) -> nbformat.NotebookNode:
    """Run a notebook in its own folder; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    client.execute(
        env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    )  # of tqdm, which no notebook uses
    for cell in notebook.cells:  # times and counts of a run are no content
        cell.metadata.pop("execution", None)
    return notebook


if __name__ == "__main__":
    chosen = [Path(argument) for argument in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in chosen:
        print(f"executing {path.name}", flush=True)
        nbformat.write(execute(path), path)
