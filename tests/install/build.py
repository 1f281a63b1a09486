"""Build the wheel and the source distribution from the files that git knows: `python tests/install/build.py DIRECTORY`.

Other files of a working tree, such as an earlier `build/` or a list of an earlier build's files, would get into both.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = """
import sys
from setuptools import build_meta
directory = sys.argv[1]  # setuptools replaces sys.argv
build_meta.build_sdist(directory)
build_meta.build_wheel(directory)
"""


def build(directory: Path) -> tuple[Path, Path]:
    """The paths of the wheel and of the source distribution.

    Args:
        directory: Where to write them.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # git still lists a file that was just removed
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        out = Path(folder) / "dist"
        out.mkdir()
        subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=folder, capture_output=True, check=True)
        wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
        return Path(shutil.copy2(wheel, directory)), Path(shutil.copy2(sdist, directory))


if __name__ == "__main__":
    print(*build(Path(sys.argv[1])), sep="\n")
