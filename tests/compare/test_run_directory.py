"""A directory with results: resumed, merged, refused or started anew, and never overwritten silently."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lightning_uq.compare import Configuration, Progress, Recipe, RunOptions, compare
from lightning_uq.errors import InputError
from tests.compare.runs import TIMES

QUICK = Configuration(data="diabetes", methods=("gaussian", "conformal"), seeds=2, recipe=Recipe(max_epochs=1))


class Log(Progress):
    def __init__(self):
        self.trained_methods, self.notes, self.begun = [], [], None

    def start(self, trainings, epochs, done):
        self.begun = trainings, done

    def note(self, text):
        self.notes.append(text)

    def trained(self, method, seed, epochs, seconds):
        self.trained_methods.append((method, seed))


def run(folder, configuration=QUICK, **options):
    log = Log()
    return compare(configuration, log, folder, RunOptions(**options)), log


def rows(comparison):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in comparison.rows]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole():
    return run(None, replace(QUICK, methods=("gaussian", "conformal", "ensemble_mean")))[0]


def test_each_training_writes_its_records_and_the_rows_that_are_complete(tmp_path):
    seen = []

    class Look(Log):
        def training(self, method, seed):
            file = tmp_path / "results.json"
            found = json.loads(file.read_text()) if file.exists() else {"rows": [], "missing": None}
            seen.append(([row["method"] for row in found["rows"]], found["missing"]))

    compare(replace(QUICK, methods=("gaussian", "conformal", "ensemble_mean")), Look(), tmp_path)
    assert seen == [
        ([], None),
        ([], {"gaussian": 1, "conformal": 1, "ensemble_mean": 2}),
        (["gaussian", "conformal"], {"ensemble_mean": 2}),
        (["gaussian", "conformal"], {"ensemble_mean": 1}),
    ]


def test_methods_join_a_complete_comparison(tmp_path, whole):
    first, log = run(tmp_path)
    assert log.begun == (2, 0)
    joined, log = run(tmp_path, replace(QUICK, methods=("ensemble_mean", "gaussian")))
    assert (log.begun, log.trained_methods) == ((4, 2), [("ensemble_mean", 0), ("ensemble_mean", 1)])
    assert log.notes[1:] == [  # the first one tells the task
        f"gaussian is already in {tmp_path} and not trained again.",
        f"The rows of conformal in {tmp_path} are kept.",
    ]
    assert rows(joined) == rows(whole)
    assert joined.rows[:2] == first.rows  # the times, too
    assert joined.configuration == whole.configuration

    read, log = run(tmp_path, replace(QUICK, methods=("conformal", "evidential")))
    assert [name for name, _ in log.trained_methods] == ["evidential", "evidential"]
    assert [row["method"] for row in read.rows] == ["gaussian", "conformal", "ensemble_mean", "evidential"]


def test_a_reader_that_joins_has_the_numbers_that_it_has_in_one_run(tmp_path, whole):
    run(tmp_path, replace(QUICK, methods=("gaussian",)))
    joined, log = run(tmp_path, replace(QUICK, methods=("conformal",)))
    assert log.trained_methods == [("gaussian", 0), ("gaussian", 1)]
    assert rows(joined) == rows(whole)[:2]


def test_an_interrupted_run_is_neither_completed_nor_overwritten_unasked(tmp_path):
    done, _ = run(tmp_path)
    (tmp_path / "records/conformal-1.npz").unlink()
    before = contents(tmp_path)
    with pytest.raises(
        InputError, match=r"conformal lacks seeds. Continue it with `resume`, or start again with `overwrite`"
    ):
        run(tmp_path)
    assert contents(tmp_path) == before
    resumed, log = run(tmp_path, resume=True)
    assert (log.begun, log.trained_methods) == ((2, 1), [("gaussian", 1)])
    assert rows(resumed) == rows(done)
    assert resumed.rows[0] == done.rows[0]
    again, log = run(tmp_path, resume=True)
    assert (log.begun, log.trained_methods) == ((2, 2), [])
    assert again.rows == resumed.rows


def test_resuming_what_is_not_there_begins(tmp_path):
    assert run(tmp_path, resume=True)[1].begun == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "`seeds` is 1, but in the comparison in .* it is 2"),
        ({"seed": 1}, "`seed` is 1, but in the comparison in .* it is 0"),
        ({"recipe": Recipe(max_epochs=2)}, "`max_epochs` is 2, but in the comparison in .* it is 1"),
        (
            {"network": "tests.compare.networks:make"},
            "`network` is tests.compare.networks:make, but in the comparison in .* it is mlp",
        ),
        (
            {"data": "digits", "methods": ("softmax",)},
            "`data`: The samples of digits differ from those of diabetes at the start of the comparison in .*",
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"resume": True}])
def test_another_configuration_is_refused(finished, change, message, options):
    before = contents(finished)
    with pytest.raises(InputError, match=message + r"\. Choose another `out`, or start again with `overwrite`\."):
        run(finished, replace(QUICK, **change), **options)
    assert contents(finished) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def test_the_default_network_and_its_name_are_the_same(finished):
    assert run(finished, replace(QUICK, network="mlp"))[1].trained_methods == []


def table(path, *, shift=0.0):
    x = np.random.default_rng(0).normal(size=(60, 3))
    np.savez(path, x=x, y=x[:, 0] + shift * (np.arange(60) == 7))
    return str(path)


def test_data_may_move_but_not_change(tmp_path):
    (tmp_path / "run").mkdir()
    own = replace(QUICK, data=table(tmp_path / "mine.npz"), methods=("gaussian",))
    run(tmp_path / "run", own)
    (tmp_path / "there").mkdir()
    moved = replace(own, data=table(tmp_path / "there/mine.npz"))
    assert run(tmp_path / "run", moved)[1].trained_methods == []
    table(tmp_path / "mine.npz", shift=0.5)  # one number of one row
    with pytest.raises(InputError, match=r"`data`: The samples of .*mine.npz differ"):
        run(tmp_path / "run", own, resume=True)


OWN = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, shift, num):
        self.shift, self.num = shift, num

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        return {"x": torch.full((3,), float(i)) + self.shift + 1e-3 * torch.rand(3), "y": torch.tensor(float(i % 7))}


class OwnData(LightningDataModule):
    def __init__(self, shift: float = 0.0):
        super().__init__()
        self.shift = shift

    def _loader(self, num):
        return DataLoader(Rows(self.shift, num), batch_size=8, collate_fn=lambda rows: (
            torch.stack([row["x"] for row in rows]), torch.stack([row["y"] for row in rows]).unsqueeze(1)))

    def train_dataloader(self):
        return self._loader(40)

    def val_dataloader(self):
        return self._loader(20)

    def test_dataloader(self):
        return self._loader(20)
"""


@pytest.mark.filterwarnings("ignore:(.|\\n)*:DeprecationWarning")  # jsonargparse tells of its next release
def test_a_data_module_of_ones_own(tmp_path, monkeypatch):
    """Its samples are not tensors in memory, and a transform is random."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_rows.py").write_text(OWN)
    (tmp_path / "run").mkdir()

    def with_shift(shift):
        (tmp_path / "own.yaml").write_text(f"data: {{init_args: {{shift: {shift}}}}}\n")
        return Configuration(
            data_module="own_rows:OwnData",
            config=str(tmp_path / "own.yaml"),
            methods=("gaussian",),
            seeds=1,
            recipe=Recipe(max_epochs=1),
        )

    assert run(tmp_path / "run", with_shift(0.0))[1].trained_methods == [("gaussian", 0)]
    assert run(tmp_path / "run", with_shift(0.0))[1].trained_methods == []
    with pytest.raises(InputError, match=r"`config: data` is .*'shift': 1.0"):
        run(tmp_path / "run", with_shift(1.0))
    (tmp_path / "own_rows.py").write_text(OWN + "# changed\n")
    with pytest.raises(InputError, match="`data_module`: The file of the data module has changed"):
        run(tmp_path / "run", with_shift(0.0))


METHOD = """
from lightning_uq import DeterministicModule, Method
METHOD = Method(
    name="mine",
    build=lambda setting: DeterministicModule(setting.network, **setting.training),
    ood_score="variance",
    tasks=("regression",),
)
"""


def test_a_users_file_may_not_change(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    file = tmp_path / "method_that_changes.py"
    file.write_text(METHOD)
    mine = replace(QUICK, methods=("gaussian", str(file)))
    run(tmp_path / "run", mine)
    assert run(tmp_path / "run", mine)[1].trained_methods == []
    file.write_text(METHOD + "# changed\n")
    with pytest.raises(InputError, match=r"`methods`: The file of method mine has changed"):
        run(tmp_path / "run", mine, resume=True)
    # Its row stays where others join.
    joined, _ = run(tmp_path / "run", replace(QUICK, methods=("evidential",)))
    assert [row["method"] for row in joined.rows] == ["gaussian", "mine", "evidential"]
    assert joined.results()["methods"]["mine"]["ood_score"] == "variance"


def test_overwriting_removes_its_own_files_alone(tmp_path):
    run(tmp_path)
    others = {"notes.txt": b"mine", "plots/results.json": b"{}", "records/notes.txt": b"mine", "a.png": b"mine"}
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name in ("report.html", "risk_coverage.png", "records/.conformal-1.npz.partial"):
        (tmp_path / name).write_bytes(b"old")
    again, log = run(tmp_path, replace(QUICK, methods=("evidential",), seeds=1), overwrite=True)
    assert log.trained_methods == [("evidential", 0)]
    assert [row["method"] for row in again.rows] == ["evidential"]
    left = {path.as_posix() for path in contents(tmp_path)}
    assert left >= set(others)
    assert left - set(others) == {"run.json", "results.json", "records/evidential-0.npz"}
    with pytest.raises(InputError, match="`resume` continues a comparison, and `overwrite` removes it"):
        run(tmp_path, overwrite=True, resume=True)


def test_a_mistake_beside_overwrite_costs_nothing(tmp_path):
    run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(InputError):
        run(tmp_path, replace(QUICK, methods=("unknown",)), overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["results.json", "report.html", "records/gaussian-0.npz", "differences_nll.png"])
def test_results_that_no_state_explains_are_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{}")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"holds .*Choose another `out`, or start again with `overwrite`"):
        run(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"format": 0}'])
def test_a_broken_state_is_refused(tmp_path, text):
    run(tmp_path, replace(QUICK, methods=("gaussian",), seeds=1))
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json .*Choose another `out`, or start again with `overwrite`"):
        run(tmp_path, resume=True)


def test_a_directory_with_files_of_others_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run(tmp_path, replace(QUICK, methods=("gaussian",), seeds=1))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_versions_are_told(tmp_path):
    run(tmp_path, replace(QUICK, methods=("gaussian",), seeds=1))
    state = json.loads((tmp_path / "run.json").read_text())
    state["versions"]["torch"] = "0.1"
    (tmp_path / "run.json").write_text(json.dumps(state))
    _, log = run(tmp_path, replace(QUICK, methods=("evidential",), seeds=1))
    assert any("were made with other versions: torch 0.1, now" in note for note in log.notes)
