"""What the wheel and the source distribution hold."""

import email
import subprocess
import tarfile
import zipfile

import pytest

from lightning_uq.version import __version__
from tests.install.build import ROOT, build

PACKAGE = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_uq").rglob("*.py")}
DATA = {"lightning_uq/py.typed", "lightning_uq/report/page.html.jinja"}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions[0]) as archive:
        names = set(archive.namelist())
        info = f"lightning_uq-{__version__}.dist-info/"
        metadata = email.message_from_bytes(archive.read(f"{info}METADATA"))
        assert b"lightning-uq = lightning_uq.cli:main" in archive.read(f"{info}entry_points.txt")
    assert {name for name in names if not name.startswith(info)} == PACKAGE | DATA
    assert f"{info}licenses/LICENSE" in names
    assert metadata["Name"] == "lightning-uq"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_source_distribution_holds_the_package_and_nothing_else(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not name.startswith("lightning_uq.egg-info/")}
    outside = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert names == PACKAGE | DATA | outside


def test_every_data_file_of_the_package_is_listed_above():
    listed = subprocess.run(["git", "ls-files", "lightning_uq"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for name in listed.stdout.split() if not name.endswith(".py")} == DATA
