"""Only records that depend on the same things stand in one table: the module, its arguments, and every sample."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lightning_uq.compare import Configuration, Recipe, compare
from lightning_uq.compare.planning import marks
from lightning_uq.compare.planning.marks import marks_of
from lightning_uq.data import image_folder, open_data
from lightning_uq.errors import InputError
from tests.compare.test_run_directory import QUICK, contents, rows, run

MODULE = Configuration(
    module="tests.compare.users_modules:LitClassifier", methods=("module",), seeds=1, recipe=Recipe(max_epochs=1)
)


def config_file(folder, **content):
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.filterwarnings("ignore:(.|\\n)*:DeprecationWarning")  # jsonargparse tells of its next release
def test_rows_of_a_module_with_other_arguments_are_not_kept(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    run(out, MODULE)
    before = contents(out)
    big = replace(MODULE, config=config_file(tmp_path, module={"init_args": {"hidden": 64}}))
    with pytest.raises(
        InputError, match=r"`config: module` is .*'hidden': 64.*, but in the comparison in .* it is \{\}"
    ):
        run(out, big)
    assert contents(out) == before
    # Methods that need no module may join its rows, and its rows those methods.
    joined, log = run(out, replace(MODULE, module=None, methods=("softmax",)))
    assert log.trained_methods == [("softmax", 0)]
    assert [row["method"] for row in joined.rows] == ["module", "softmax"]
    with pytest.raises(InputError, match="`config: module`"):
        run(out, big)


def test_further_seeds_go_on_and_nothing_is_trained_twice(tmp_path):
    one = replace(QUICK, seeds=1)
    run(tmp_path, one)
    with pytest.raises(
        InputError, match=r"an incomplete comparison: gaussian, conformal lacks seeds. Continue it with `resume`"
    ):
        run(tmp_path, replace(one, seeds=3))
    more, log = run(tmp_path, replace(one, seeds=3), resume=True)
    assert (log.begun, log.trained_methods) == ((3, 1), [("gaussian", 1), ("gaussian", 2)])
    assert rows(more) == rows(compare(replace(one, seeds=3)))
    assert more.results()["configuration"]["seeds"] == 3
    with pytest.raises(InputError, match="`seeds` is 2, but in the comparison in .* it is 3"):
        run(tmp_path, replace(one, seeds=2), resume=True)


def test_no_row_silently_lacks_further_seeds(tmp_path):
    run(tmp_path, replace(QUICK, seeds=1))
    with pytest.raises(
        InputError, match=r"its rows of conformal would lack the additional seeds. Add these methods to `methods`"
    ):
        run(tmp_path, replace(QUICK, methods=("gaussian",)), resume=True)


def folder_of_images(path, num=12):
    for i in range(num):
        for part in ("train", "val", "test"):
            for label, name in enumerate(("cat", "dog")):
                file = path / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), 20 * i + 5 * label, dtype=np.uint8)).save(file)
    return str(path)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_one_changed_image_is_noticed(tmp_path, monkeypatch, limit):
    """Also where the images are read from their files whenever a batch needs them."""
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    path = folder_of_images(tmp_path / "pets")
    before = marks_of(open_data(path, batch_size=2))
    assert marks_of(open_data(path, batch_size=2)) == before
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / "pets/test/dog/9.png")
    after = marks_of(open_data(path, batch_size=2))
    assert {part for part in before if before[part] != after[part]} == {"test"}


LATE = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Late(LightningDataModule):
    def __init__(self, target: float = 0.0, value: float = 0.0):
        super().__init__()
        x, y = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.arange(64.0).sin().unsqueeze(1)
        y[60] += target
        x[60] += value
        self.rows = TensorDataset(x, y)

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8, shuffle=True)

    val_dataloader = test_dataloader = train_dataloader
"""


@pytest.mark.filterwarnings("ignore:(.|\\n)*:DeprecationWarning")  # jsonargparse tells of its next release
def test_changes_in_late_batches_of_a_data_module_are_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "late_rows.py").write_text(LATE)

    def marked(**arguments):
        config = config_file(tmp_path, data={"init_args": arguments})
        return marks_of(Configuration(data_module="late_rows:Late", config=config).make_data(0))

    plain = marked()
    assert marked() == plain
    for changed in (marked(target=1.0), marked(value=1.0)):
        assert all(changed[part] != plain[part] for part in ("train", "val", "test"))


UNSEEDED = """
import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Unseeded(LightningDataModule):
    def setup(self, stage):
        if not hasattr(self, "order"):
            self.order = torch.from_numpy(np.random.default_rng().permutation(80))

    def _loader(self, rows):
        x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x[rows], x[rows].sum(1, keepdim=True)), batch_size=20)

    def train_dataloader(self):
        return self._loader(self.order[:40])

    def val_dataloader(self):
        return self._loader(self.order[40:60])

    def test_dataloader(self):
        return self._loader(self.order[60:])
"""


@pytest.fixture
def unseeded(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unseeded_rows.py").write_text(UNSEEDED)
    return replace(QUICK, data="unseeded_rows:Unseeded", data_module="unseeded_rows:Unseeded", methods=("gaussian",))


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_methods_are_never_compared_on_different_test_rows(unseeded, jobs, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match=r"Unseeded has different test rows each time it is built.*Seed its split"):
        run(tmp_path / "run", unseeded, jobs=jobs)
    assert not contents(tmp_path / "run")


def test_a_split_by_the_global_random_numbers_is_the_same_everywhere(unseeded, tmp_path, monkeypatch):
    seeded = UNSEEDED.replace("np.random.default_rng().permutation", "np.random.permutation").replace(
        "Unseeded", "Drawn"
    )
    (tmp_path / "drawn_rows.py").write_text(seeded)
    found, _ = run(None, replace(unseeded, data="drawn_rows:Drawn", data_module="drawn_rows:Drawn"))
    assert len(found.rows) == 1


def test_data_that_change_while_the_comparison_runs_end_it(tmp_path, monkeypatch):
    """The second training finds other rows in the file than the plan did."""
    file = tmp_path / "mine.npz"
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.savez(file, x=x, y=x[:, 0])

    class Change(type(run(None, replace(QUICK, seeds=1))[1])):
        def trained(self, method, seed, epochs, seconds):
            super().trained(method, seed, epochs, seconds)
            np.savez(file, x=x, y=x[:, 1])

    log = Change()
    with pytest.raises(InputError, match="The test rows of mine have changed since the start of the comparison"):
        compare(replace(QUICK, data=str(file), methods=("gaussian",)), log)
    assert log.trained_methods == [("gaussian", 0)]


def test_the_plan_finds_the_monitor_once(monkeypatch):
    """A validation of one batch finds it, which no training repeats."""
    from lightning_uq.compare.planning import plan
    from lightning_uq.compare.training import monitor

    seen = []

    def counting(module, data, accelerator):
        seen.append(type(module).__name__)
        return ["val_loss"]

    monkeypatch.setattr(monitor, "_logged", counting)
    compare(replace(MODULE, seeds=2))
    assert seen == ["LitClassifier"]
    assert plan.find_monitor is monitor.find_monitor


def test_an_unknown_baseline_is_refused_before_any_training(tmp_path):
    with pytest.raises(InputError, match=r"`baseline` is 'nope', but no method for regression has this name"):
        run(tmp_path, replace(QUICK, baseline="nope"))
    with pytest.raises(InputError, match=r"`baseline` is 'evidential', but the compared methods are gaussian"):
        run(tmp_path, replace(QUICK, baseline="evidential"))
    assert not contents(tmp_path)
    run(tmp_path, replace(QUICK, methods=("evidential",), seeds=1))
    joined, _ = run(tmp_path, replace(QUICK, methods=("gaussian",), seeds=1, baseline="evidential"))
    assert joined.results()["baseline"] == "evidential"


def test_a_baseline_that_cannot_run_is_an_error():
    arguments = {"network": "tests.compare.test_trial:plain", "seeds": 1, "recipe": Recipe(max_epochs=1)}
    with pytest.raises(InputError, match=r"methods: dropout cannot run .*no dropout layers"):
        compare(Configuration(baseline="dropout", **arguments))


def test_marks_of_all_seeds_are_those_of_their_data():
    from lightning_uq.compare.problem import make_problem

    found = marks.marks_of_seeds(QUICK, make_problem(QUICK, 0))
    assert list(found) == [0, 1]
    assert found[1] == marks_of(QUICK.make_data(1)) != found[0]
