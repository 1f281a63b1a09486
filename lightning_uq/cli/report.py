"""``lightning-uq report``."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_uq.cli.output import make_console, output_directory
from lightning_uq.cli.tables import TableFormat, print_results

if TYPE_CHECKING:
    from rich.console import Console


def report(run_dir: Path, *, out: Path | None = None, format: TableFormat = "terminal") -> None:
    """Write the page, the figures and the table of a run again, without training.

    A run is a directory that `lightning-uq compare` or the callback UncertaintyReport wrote, with results.json and records. If the folders of
    RUN_DIR hold several runs, one page covers all of them. It compares modules that UncertaintyReport tested on the same rows. Other runs get
    one card each, and methods get mean ranks over the data sets. For the JSON file of `lightning-uq evaluate`, the page is written beside it.

    Args:
        run_dir: Directory of one run or of several runs, or the JSON file of an evaluation.
        out: Directory to write report.html and the figures to (default: RUN_DIR).
        format: Format of the printed table.
    """
    console = make_console()
    from lightning_uq.compare.directory.index import find_runs, skipped_folders, write_index
    from lightning_uq.compare.directory.reading import RESULTS, read_run
    from lightning_uq.compare.directory.writing import write_page

    if run_dir.is_file():
        _evaluation(run_dir, out, console)
        return
    directory = run_dir if out is None else out
    if run_dir.is_dir() and not (run_dir / RESULTS).exists():
        runs = find_runs(run_dir)
        with output_directory(directory):
            joined = write_index(runs, directory)
        if joined is not None:
            print_results(joined, format, console)
        for sentence in skipped_folders(run_dir, runs):
            make_console(stderr=True).print(sentence, highlight=False, soft_wrap=True, markup=False)
        message = f"Wrote report.html over {len(runs)} runs to {directory}"
    else:
        results, records = read_run(run_dir)
        with output_directory(directory):
            files = write_page(results, records, directory)
        print_results(results, format, console)
        figures = sum(name.endswith(".png") for name in files)
        message = f"Wrote report.html and {figures} figures to {directory}"
    make_console(stderr=format != "terminal").print(message, highlight=False, soft_wrap=True)


def _evaluation(path: Path, out: Path | None, console: "Console") -> None:
    """The page and the table of an evaluation."""
    from lightning_uq.evaluate import make_table, read_result, write_page

    result = read_result(path)
    page = (path.parent if out is None else out) / path.with_suffix(".html").name
    with output_directory(page.parent):
        write_page(result, page)
    console.print(make_table(result))
    console.print(f"Wrote {page}", highlight=False, soft_wrap=True)
