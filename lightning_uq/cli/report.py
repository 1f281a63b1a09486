"""``lightning-uq report``."""

from pathlib import Path

from lightning_uq.cli.output import make_console, output_directory
from lightning_uq.cli.tables import TableFormat, print_results


def report(run_dir: Path, *, out: Path | None = None, format: TableFormat = "terminal") -> None:
    """Make the page, the figures and the table of a run again, without any training.

    A run is a directory with results.json and records, which `lightning-uq compare` or the callback UncertaintyReport wrote.

    Args:
        run_dir: Directory of the run.
        out: Directory to write report.html and the figures to (default: RUN_DIR).
        format: How the table is printed.
    """
    console = make_console()
    from lightning_uq.compare.files import write_page
    from lightning_uq.compare.run_files import read_run

    results, records = read_run(run_dir)
    directory = run_dir if out is None else out
    with output_directory(directory):
        files = write_page(results, records, directory)
    print_results(results, format, console)
    figures = sum(name.endswith(".png") for name in files)
    message = f"Wrote report.html and {figures} figures to {directory}"
    make_console(stderr=format != "terminal").print(message, highlight=False, soft_wrap=True)
