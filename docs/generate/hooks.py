"""What mkdocs calls while it builds the site: pages and figures that are generated, formulas, citations.

The site is built from the root of the repository, by ``python -m mkdocs``, so that this file finds its neighbours.
"""

from pathlib import Path

from mkdocs.structure.files import File

from docs.generate import api, bibliography, chooser, figures, formulas, notebooks, repository

ROOT = Path(__file__).parents[2]


def on_files(files, config):
    """Add the generated pages and figures."""
    generated = {
        "references.md": bibliography.page,
        **api.pages(),
        **repository.pages(),
        **figures.files(),
        **notebooks.files(),
    }
    for path, make in generated.items():
        files.append(File.generated(config, path, content=make()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in the tables of methods, and lead links to files of the repository to their pages."""
    return repository.relink(chooser.fill(markdown, ROOT / "docs" / page.file.src_uri), page.file.src_uri)


def on_page_content(html, page, config, files):
    """Draw formulas and figures into the page, and link its citations."""

    def relative(path):
        return files.get_file_from_path(path).url_relative_to(page.file)

    return bibliography.link(figures.inline(formulas.render(html)), relative("references.md"), page.file.src_uri)
