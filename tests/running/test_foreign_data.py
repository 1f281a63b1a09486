import csv
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from lightning_uq.errors import InputError
from lightning_uq.running.foreign_data import ForeignDataModule
from lightning_uq.tasks import Binary, Classification, Multilabel, Regression, Segmentation, task_for

# ------------------------------------------------------------------ data modules as their authors write them


class Digits(Dataset):
    """What torchvision's MNIST gives with ToTensor: images and Python integers."""

    classes = ("zero", "one", "two")

    def __init__(self, num, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.rand(num, 1, 6, 6, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 3


class MNISTDataModule(LightningDataModule):
    def __init__(self, data_dir: str = "./", batch_size: int = 8):
        super().__init__()
        self.data_dir = data_dir
        self.batch_size = batch_size

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage: str):
        assert self.prepared
        if stage == "fit":
            self.mnist_train, self.mnist_val = random_split(Digits(50, 0), [40, 10])  # with the global generator
        if stage == "test":
            self.mnist_test = Digits(20, 1)
        if stage == "predict":
            self.mnist_predict = Digits(5, 2)

    def train_dataloader(self):
        return DataLoader(self.mnist_train, batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.mnist_val, batch_size=self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.mnist_test, batch_size=self.batch_size, shuffle=True)

    def predict_dataloader(self):
        return DataLoader(self.mnist_predict, batch_size=self.batch_size)


class TableDataset(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        *features, price = self.rows[index]
        return {"features": torch.tensor(features), "target": torch.tensor([price]), "id": f"house {index}"}


class HousesDataModule(LightningDataModule):
    """A CSV file, batches that are mappings, and a stage that is not used."""

    def __init__(self, path, fraction=0.2, batch_size=16):
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage=None):
        lines = Path(self.hparams.path).read_text().splitlines()
        rows = [[float(value) for value in row] for row in list(csv.reader(lines))[1:]]
        num = int(len(rows) * self.hparams.fraction)
        self.train, self.val, self.test = (
            TableDataset(part) for part in (rows[2 * num :], rows[:num], rows[num : 2 * num])
        )

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(self.val, self.hparams.batch_size)]

    def test_dataloader(self):
        return DataLoader(self.test, self.hparams.batch_size)

    def ood_dataloaders(self):
        return {"mansions": DataLoader(self.test, self.hparams.batch_size)}


@pytest.fixture
def houses(tmp_path):
    rows = [f"{50 + i},{i % 5},{1000.0 * i + 7}" for i in range(60)]
    (tmp_path / "houses.csv").write_text("\n".join(["size,rooms,price", *rows]))
    return str(tmp_path / "houses.csv")


def arrays(y, x=None, **others):
    """A data module over fixed targets."""

    class Arrays(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(len(y), 3) if x is None else x, y), 8)

        val_dataloader = test_dataloader = train_dataloader

    for name, value in others.items():
        setattr(Arrays, name, value)
    return Arrays()


# ------------------------------------------------------------------ what a comparison reads


def test_a_module_of_labelled_images():
    data = ForeignDataModule(MNISTDataModule())
    assert (data.name, data.task, data.input_shape, data.num_outputs) == (
        "MNISTDataModule",
        "classification",
        (1, 6, 6),
        3,
    )
    assert task_for(data) == Classification(num_classes=3)
    assert (data.num_train, len(data.test_rows), data.class_names) == (40, 20, ("0", "1", "2"))
    assert data.notes == ("Seeds affect only the training, since MNISTDataModule has its own split.",)
    assert data.ood_dataloaders() == {}
    # The test loader shuffles, but positions stay.
    x = torch.cat([x for x, _ in data.test_dataloader()])
    assert torch.equal(x, Digits(20, 1).images)
    assert len(torch.cat([y for _, y in data.predict_dataloader()])) == 5


def test_a_split_that_is_drawn_in_a_loader_is_the_same_each_time():
    class Drawn(MNISTDataModule):
        def test_dataloader(self):
            return DataLoader(Subset(Digits(20, 1), torch.randperm(20)[:10].tolist()), 5)

    data, again = ForeignDataModule(Drawn()), ForeignDataModule(Drawn())
    data.setup()
    torch.manual_seed(1)
    again.setup()
    assert data.marks == again.marks
    first, second = (torch.cat([x for x, _ in data.test_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)


def test_the_split_and_the_random_state_do_not_depend_on_each_other():
    def trained_on(seed):
        torch.manual_seed(seed)
        data = ForeignDataModule(MNISTDataModule())
        state = torch.get_rng_state()
        data.setup()
        assert torch.equal(torch.get_rng_state(), state)
        return data.inner.mnist_train.indices

    assert trained_on(0) == trained_on(1)


def test_a_module_of_a_table_with_mappings(houses):
    data = ForeignDataModule(HousesDataModule(houses))
    assert (data.task, data.input_shape, data.num_outputs, data.num_train) == ("regression", (2,), 1, 36)
    prices = torch.arange(24, 60).double() * 1000 + 7
    assert data.task_arguments == {"target_scale": ((prices.mean(),), (prices.std(correction=0),))}
    assert isinstance(task_for(data), Regression)
    assert list(data.ood_dataloaders()) == ["mansions"]
    assert next(iter(data.test_dataloader()))["id"][0] == "house 0"


def test_a_module_by_its_path(tmp_path, monkeypatch, houses):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "users_data.py").write_text("from lightning_uq.data import NpzDataModule as Renamed\n")
    with pytest.raises(
        InputError,
        match=r"NpzDataModule\(path, .*\) does not accept \{'file': 'x'\}: missing a required argument: 'path'",
    ):
        ForeignDataModule("users_data:Renamed", {"file": "x"})
    for path in ("users_data:Nothing", "users_data.Nothing", "torch.nn:Linear"):
        with pytest.raises(InputError, match="`data_module` must be the import path of a LightningDataModule, but"):
            ForeignDataModule(path)
    with pytest.raises(
        InputError, match="must be a LightningDataModule or the import path of one, but its type is DataLoader"
    ):
        ForeignDataModule(DataLoader([1]))


FLAGS = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
MAPS = torch.arange(4 * 25).reshape(4, 5, 5) % 3


@pytest.mark.parametrize(
    ("y", "x", "expected", "num_outputs"),
    [
        (torch.tensor([0, 3, 1, 2]), None, Classification(num_classes=4), 4),
        (torch.tensor([True, False, True, True]), None, Binary(), 1),
        (torch.tensor([[1.0], [0.0], [1.0], [1.0]]), None, Binary(), 1),
        (FLAGS, None, Multilabel(num_labels=3), 3),
        (FLAGS.float(), None, Multilabel(num_labels=3), 3),
        (MAPS, torch.zeros(4, 2, 5, 5), Segmentation(num_classes=3), 3),
        (torch.where(MAPS == 2, 255, MAPS), torch.zeros(4, 2, 5, 5), Segmentation(num_classes=2, ignore_index=255), 2),
        (torch.where(MAPS == 2, -1, MAPS), torch.zeros(4, 2, 5, 5), Segmentation(num_classes=2, ignore_index=-1), 2),
        (torch.tensor([1.0, 2.0, 3.0, 6.0]), None, Regression(target_scale=((3.0,), (3.5**0.5,))), 1),
        (torch.tensor([1.0, 3.0, float("nan"), 2.0]), None, Regression(target_scale=((2.0,), ((2 / 3) ** 0.5,))), 1),
    ],
)
def test_tasks_that_targets_show(y, x, expected, num_outputs):
    data = ForeignDataModule(arrays(y, x))
    assert task_for(data) == expected
    assert data.num_outputs == num_outputs
    task = replace(expected, head="mean") if isinstance(expected, Regression) else expected
    task.check_target(y, torch.zeros(1, len(y), num_outputs, *(y.shape[1:] if y.ndim > 2 else ())))


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (
            torch.eye(4),
            "auto",
            r"task of Arrays is unclear from its training targets, which are torch.float32 of shape \[4, 4\], .* Pass `task`, one of",
        ),
        (torch.eye(4).long(), "auto", "is unclear from its training targets"),
        (torch.tensor([[1, 2], [3, 4]]), "auto", "is unclear from its training targets"),
        (torch.tensor([0, 2, 1]), "binary", "task='binary' needs targets 0 and 1, but those of Arrays hold 2"),
        (
            torch.tensor([0.5, 0.2]),
            "classification",
            "task='classification' needs integer labels 0 ... C-1 .* are torch.float32",
        ),
        (torch.tensor([1, -1]), "auto", "needs integer labels 0 ... C-1 of at least 2 classes, .* from -1 to 1"),
        (torch.tensor([1, 1]), "auto", "at least 2 classes"),
        (
            torch.tensor([[0], [1]]),
            "auto",
            r"task='classification' does not match the targets of Arrays, whose shape is \[2, 1\]",
        ),
        (torch.tensor([0, 1]), "multilabel", "task='multilabel' does not match"),
        (torch.tensor([2.0, 2.0]), "regression", "The training targets of Arrays must vary"),
    ],
)
def test_targets_without_a_plain_task(y, task, message):
    with pytest.raises(InputError, match=message):
        ForeignDataModule(arrays(y), task=task).setup()
    with pytest.raises(InputError, match="`task` must be one of auto, classification, .* but it is 'ranking'"):
        ForeignDataModule(arrays(y), task="ranking")


def test_a_given_task_overrules():
    data = ForeignDataModule(arrays(torch.tensor([0.0, 1.0, 1.0])), task="regression")
    assert (data.task, data.num_outputs, data.class_names) == ("regression", 1, ())


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_missing_loaders(part):
    y = torch.tensor([0, 1, 2])
    hook = f"{part}_dataloader"
    for value, message in (
        (getattr(LightningDataModule, hook), f"Arrays must have exactly one `{hook}`, but it has none. All methods"),
        (lambda self: [DataLoader(TensorDataset(y, y))] * 2, f"one `{hook}`, but it returns 2 loaders"),
        (lambda self: [], f"one `{hook}`, but it has none"),
        (lambda self: DataLoader([]), f"The {part} loader must hold batches, but it is empty"),
        (
            lambda self: DataLoader(torch.zeros(3, 2)),
            f"of the {part} loader must have targets .* are NoneType. Pass `unpack_batch`",
        ),
    ):
        with pytest.raises(InputError, match=message):
            ForeignDataModule(arrays(y, **{hook: value})).setup()


@pytest.mark.parametrize("made", [None, "loader", ["a", "b"], {"far": "a"}])
def test_names_of_out_of_distribution_loaders(made):
    data = ForeignDataModule(arrays(torch.tensor([0, 1]), ood_dataloader=lambda self: made))
    expected = {"loader": {"ood": "loader"}, None: {}}
    assert data.ood_dataloaders() == (
        expected[made]
        if not isinstance(made, list | dict)
        else made
        if isinstance(made, dict)
        else {"ood_0": "a", "ood_1": "b"}
    )


def test_batches_that_need_a_function_and_inputs_that_are_no_tensors():
    class Pairs(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            return {"a": torch.zeros(2), "b": torch.ones(2), "y": index % 3}

    data = ForeignDataModule(
        arrays(
            None,
            **dict.fromkeys(
                ["train_dataloader", "val_dataloader", "test_dataloader"], lambda self: DataLoader(Pairs(), 2)
            ),
        ),
        unpack_batch=lambda batch: ((batch["a"], batch["b"]), batch["y"]),
    )
    assert (data.task, data.num_train) == ("classification", 6)
    with pytest.raises(InputError, match="The inputs of Arrays are not tensors, so no network can be chosen"):
        _ = data.input_shape


# ------------------------------------------------------------------ under a Trainer


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen.append(float(x.max()))
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(data):
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    model = Classifier()
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    return model, trainer


def test_a_trainer_takes_it_more_than_once_and_calls_the_modules_own_hooks():
    class Bright(MNISTDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert self.trainer is not None
            return batch[0] + 10, batch[1]

        def teardown(self, stage):
            del self.mnist_test

    data = ForeignDataModule(Bright())
    for _ in range(2):
        model, trainer = run(data)
        assert min(model.seen) > 10
        assert "test_loss" in trainer.callback_metrics
    plain = ForeignDataModule(MNISTDataModule())
    assert max(run(plain)[0].seen) <= 1


def test_a_module_of_the_other_tree():
    pytorch_lightning = pytest.importorskip("pytorch_lightning")

    class Twin(pytorch_lightning.LightningDataModule):
        setup = MNISTDataModule.setup
        prepare_data = MNISTDataModule.prepare_data
        train_dataloader = MNISTDataModule.train_dataloader
        val_dataloader = MNISTDataModule.val_dataloader
        test_dataloader = MNISTDataModule.test_dataloader
        batch_size = 8

    data = ForeignDataModule(Twin())
    assert (data.task, data.num_train) == ("classification", 40)
    run(data)

    class Bare(pytorch_lightning.LightningDataModule):
        pass

    with pytest.raises(InputError, match="Bare must have exactly one `train_dataloader`, but it has none"):
        ForeignDataModule(Bare()).setup()


def test_pickling(houses):
    data = ForeignDataModule(HousesDataModule(houses))
    data.setup()
    again = pickle.loads(pickle.dumps(data))
    assert again.task_arguments == data.task_arguments
