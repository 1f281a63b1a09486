"""docs/architecture.md names files that exist, and every folder of the package."""

import re
from pathlib import Path

import lightning_uq

PACKAGE = Path(lightning_uq.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text()


def test_every_path_exists():
    paths = re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", PAGE)
    paths += re.findall(r"`(?:([a-z_]+/[a-z_/]+\.py))`?", PAGE)
    assert len(paths) > 30
    missing = [path for path in paths if not (PACKAGE / path).exists() and not (PACKAGE.parent / path).exists()]
    assert not missing


def test_every_room_has_its_row():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    table = PAGE.split("## The rooms")[1].split("\n## ")[0]
    assert not [room for room in rooms if f"`{room}/" not in table]
