import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_uq.data import DiabetesDataModule, UCIDataModule
from lightning_uq.errors import InputError, MissingExtraError

ROOT = Path(__file__).parents[2] / ".." / "shared" / "data" / "uci"


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name, columns in (("mine", 4), ("naval-propulsion-plant", 18)):
        (tmp_path / name).mkdir()
        np.savetxt(tmp_path / name / "data.txt", rng.normal(3, 2, (50, columns)))
    return tmp_path


def test_diabetes():
    data = DiabetesDataModule(seed=1)
    x, y = data.dataset("train").tensors
    assert [len(data.dataset(part)) for part in ("train", "val", "test")] == [266, 88, 88]
    torch.testing.assert_close(x.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(10))
    everything = torch.cat([data.dataset(part).tensors[1] for part in ("train", "val", "test")])
    assert (everything.min(), everything.max()) == (25, 346)
    assert not torch.equal(y, DiabetesDataModule(seed=2).dataset("train").tensors[1])


def test_diabetes_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"lightning-uq\[data\]"):
        DiabetesDataModule().setup()


def test_the_published_splits(root):
    values = np.loadtxt(root / "mine" / "data.txt")
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    found = [UCIDataModule("mine", root=str(root), split=split).dataset("test").tensors[1] for split in range(3)]
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    source = np.random.RandomState(1)
    for split in range(3):
        order = source.choice(range(50), 50, replace=False)
        expected = torch.from_numpy(values[order[45:], -1:]).float()
        assert torch.equal(found[split], expected)
    data = UCIDataModule("mine", root=str(root), split=2)
    targets = torch.cat([data.dataset(part).tensors[1] for part in ("train", "val", "test")])
    assert torch.equal(targets.sort(0).values, torch.from_numpy(values[:, -1:]).float().sort(0).values)


def test_naval_has_its_target_before_a_column_that_nobody_uses(root):
    values = np.loadtxt(root / "naval-propulsion-plant" / "data.txt")
    data = UCIDataModule("naval-propulsion-plant", root=str(root))
    assert data.num_features == 16
    x, y = data.load_arrays()
    assert torch.equal(y[:, 0], torch.from_numpy(values[:, 16]).float())
    assert torch.equal(x, torch.from_numpy(values[:, :16]).float())


def test_tables_that_are_not_there(root):
    with pytest.raises(InputError, match=r"`table` must name a folder .*\(mine, naval-.*, but it is 'other'"):
        UCIDataModule("other", root=str(root)).setup()
    with pytest.raises(InputError, match="there is none"):
        UCIDataModule("other", root=str(root / "nowhere")).setup()
    with pytest.raises(InputError, match="`split` must be None or from 0 to 19, but it is 20"):
        UCIDataModule("mine", split=20)
    (root / "mine" / "data.txt").write_text("1 2\n3 x\n")
    with pytest.raises(InputError, match="must hold numbers separated by spaces"):
        UCIDataModule("mine", root=str(root)).setup()
    (root / "mine" / "data.txt").write_text("1 2\n3 nan\n")
    with pytest.raises(InputError, match=r"finite numbers .* shape is \[2, 2\], and 1 are not finite"):
        UCIDataModule("mine", root=str(root)).setup()


@pytest.mark.skipif(not ROOT.is_dir(), reason="the UCI tables are not there")
@pytest.mark.parametrize(
    ("name", "num", "num_features"), [("concrete", 1030, 8), ("naval-propulsion-plant", 11934, 16)]
)
def test_real_tables(name, num, num_features):
    data = UCIDataModule(name, root=str(ROOT), split=0)
    assert (data.num_features, data.num_targets) == (num_features, 1)
    assert sum(len(data.dataset(part)) for part in ("train", "val", "test")) == num
    assert all(data.dataset(part).tensors[0].isfinite().all() for part in ("train", "val", "test"))
