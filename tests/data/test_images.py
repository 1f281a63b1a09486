# ruff: noqa: NPY002 - the splits are those of numpy's legacy generator
import gzip
import hashlib
import pickle
import re
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from lightning_uq.data import ambiguous_digits, dirty_mnist
from lightning_uq.data.ambiguous_digits import AMBIGUOUS_FILES, blend_digits
from lightning_uq.data.dirty_mnist import DirtyMNISTDataModule
from lightning_uq.data.image_dataset import ImageDataset, shift_and_mirror, shuffled_split
from lightning_uq.data.image_files import load_images
from lightning_uq.data.images import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    KMNISTDataModule,
    MNISTDataModule,
    SVHNDataModule,
)
from lightning_uq.errors import InputError, MissingExtraError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
NUM_TRAIN, NUM_TEST = 40, 12


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, name="MNIST", parts=("train", "t10k"), seed=0):
    rng = np.random.default_rng(seed)
    for part in parts:
        number = NUM_TRAIN if part == "train" else NUM_TEST
        write_idx(root / name / "raw" / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (number, 28, 28)))
        write_idx(root / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(number) % 10)


def write_cifar(root, monkeypatch, name="CIFAR10", parts=("train", "test")):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    base = getattr(torchvision.datasets, name)
    folder = root / base.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    files = [entry[0] for part in parts for entry in getattr(base, f"{part}_list")]
    for file in files:
        number = NUM_TEST if file.startswith("test") else NUM_TRAIN // (5 if name == "CIFAR10" else 1)
        key = "labels" if name == "CIFAR10" else "fine_labels"
        content = {"data": rng.integers(0, 256, (number, 3072), dtype=np.uint8), key: list(range(number))}
        (folder / file).write_bytes(pickle.dumps(content))
    classes = [str(i) for i in range(10)]
    (folder / base.meta["filename"]).write_bytes(pickle.dumps({base.meta["key"]: classes}))


def write_svhn(root, monkeypatch):
    io = pytest.importorskip("scipy.io")
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    rng = np.random.default_rng(0)
    for part, number in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        x = rng.integers(0, 256, (32, 32, 3, number), dtype=np.uint8)
        io.savemat(root / f"{part}_32x32.mat", {"X": x, "y": np.arange(number)[:, None] % 10 + 1})


def write_ambiguous(folder, number=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    samples = torch.rand(number, 1, 28, 28, generator=generator)
    labels = torch.randint(10, (number, 10), generator=generator)
    torch.save(samples, folder / "amnist_samples.pt")
    torch.save(labels, folder / "amnist_labels.pt")
    return samples, labels


def gather(loader):
    x, y = zip(*loader, strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("num_images", [10, 57, 50_000])
@pytest.mark.parametrize("seed", [0, 1, 24])
def test_the_split_is_the_original_one(num_images, seed):
    state = np.random.get_state()
    train, val = shuffled_split(num_images, seed)
    assert all(np.array_equal(a, b) for a, b in zip(state, np.random.get_state(), strict=True))
    indices = list(range(num_images))
    np.random.seed(seed)
    np.random.shuffle(indices)
    np.random.set_state(state)
    split = int(np.floor(0.1 * num_images))
    assert val.tolist() == indices[:split]
    assert train.tolist() == indices[split:]


@pytest.mark.parametrize(
    ("kind", "folder"),
    [(MNISTDataModule, "MNIST"), (FashionMNISTDataModule, "FashionMNIST"), (KMNISTDataModule, "KMNIST")],
)
def test_the_mnist_family(kind, folder, tmp_path):
    write_mnist(tmp_path, folder)
    data = kind(str(tmp_path), batch_size=16, seed=3)
    raw, labels = load_images(data.name, tmp_path, train=True)
    assert raw.shape == (NUM_TRAIN, 1, 28, 28)
    assert raw.dtype == torch.uint8
    plain = (raw.float() / 255 - 0.1307) / 0.3081
    train, val = shuffled_split(NUM_TRAIN, 3)
    for loader, rows in ((data.uq_fit_dataloader(), train), (data.val_dataloader(), val)):
        x, y = gather(loader)
        torch.testing.assert_close(x, plain[rows])
        assert torch.equal(y, labels[rows])
    x, y = gather(data.train_dataloader())
    assert not torch.equal(y, labels[train])
    sums = [
        (rows.double() * 0.3081 + 0.1307).mul(255).round().sum((1, 2, 3)) for rows in (x, plain[train])
    ]  # of pixels
    assert torch.equal(sums[0].sort().values, sums[1].sort().values)
    again = gather(kind(str(tmp_path), batch_size=16, seed=3).train_dataloader())
    assert torch.equal(x, again[0])
    x, y = gather(data.test_dataloader())
    raw, labels = load_images(data.name, tmp_path, train=False)
    torch.testing.assert_close(x, (raw.float() / 255 - 0.1307) / 0.3081)
    assert torch.equal(y, labels)
    assert torch.equal(x, gather(data.predict_dataloader())[0])
    assert data.num_train == 36


def test_cifar_is_augmented_for_training_alone(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    data = CIFAR10DataModule(str(tmp_path), batch_size=8, seed=1)
    raw, labels = load_images("cifar10", tmp_path, train=True)
    # The order of torchvision's own images.
    own = torchvision.datasets.CIFAR10(str(tmp_path), train=True)
    assert np.array_equal(raw[7].permute(1, 2, 0).numpy(), np.asarray(own[7][0]))
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    plain = (raw.float() / 255 - mean) / std
    train, _ = shuffled_split(NUM_TRAIN, 1)
    torch.testing.assert_close(gather(data.uq_fit_dataloader())[0], plain[train])
    torch.manual_seed(0)
    one, two = (torch.stack([x for x, _ in data.dataset("train")]) for _ in range(2))
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(one, torch.stack([x for x, _ in data.dataset("train")]))
    # Each is one of the 9 x 9 x 2 views of its image, over a black border.
    black = (0 - mean) / std
    for x, image in zip(one[:5], plain[train[:5]], strict=True):
        padded = black.expand(3, 40, 40).clone()
        padded[:, 4:36, 4:36] = image
        views = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        views = torch.cat([views, views.flip(-1)])
        assert (views - x).abs().amax((1, 2, 3)).min() < 1e-5
    off = CIFAR10DataModule(str(tmp_path), augment=False)
    torch.testing.assert_close(torch.stack([x for x, _ in off.dataset("train")]), plain[train])
    assert set(labels.tolist()) == set(range(8))


def test_every_crop_and_both_mirrors_are_drawn():
    raw = torch.arange(1, 33, dtype=torch.uint8).view(1, 1, 1, 32).expand(4000, 1, 32, 32)
    raw = raw + 100 * (torch.arange(32, dtype=torch.uint8) % 2).view(1, 1, 32, 1)
    torch.manual_seed(0)
    views = shift_and_mirror(raw)
    assert views.shape == raw.shape
    assert views.dtype == torch.uint8
    kinds, counts = views.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 9 * 9 * 2
    assert counts.max() < 60


def test_the_other_colour_sets(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "CIFAR100")
    data = CIFAR100DataModule(str(tmp_path))
    assert data.has_augmentation
    assert data.num_classes == 100
    assert gather(data.val_dataloader())[0].shape == (4, 3, 32, 32)
    write_svhn(tmp_path, monkeypatch)
    data = SVHNDataModule(str(tmp_path), ood_datasets=["cifar100"])
    assert not data.augment
    x, y = gather(data.test_dataloader())
    assert x.shape == (NUM_TEST, 3, 32, 32)
    assert y.tolist()[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    own = torchvision.datasets.SVHN(str(tmp_path), split="test")
    raw, _ = load_images("svhn", tmp_path, train=False)
    assert np.array_equal(raw[3].permute(1, 2, 0).numpy(), np.asarray(own[3][0]))


def test_out_of_distribution_sets_need_their_test_files_alone(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    write_mnist(tmp_path, "KMNIST", parts=["t10k"], seed=1)
    data = MNISTDataModule(str(tmp_path), batch_size=5, ood_datasets=["kmnist"])
    x, y = gather(data.ood_dataloaders()["kmnist"])
    raw, labels = load_images("kmnist", tmp_path, train=False)
    torch.testing.assert_close(x, (raw.float() / 255 - 0.1307) / 0.3081)
    assert torch.equal(y, labels)
    assert MNISTDataModule(str(tmp_path)).ood_dataloaders() == {}
    with pytest.raises(InputError, match="The test files of FashionMNIST must be in"):
        MNISTDataModule(str(tmp_path), ood_datasets=["fashion_mnist"]).ood_dataloaders()
    write_cifar(tmp_path, monkeypatch, "CIFAR100", parts=["test"])
    write_cifar(tmp_path, monkeypatch, "CIFAR10", parts=["train"])
    data = CIFAR10DataModule(str(tmp_path), ood_datasets=["cifar100"])
    data.setup("fit")
    assert len(data.ood_dataloaders()["cifar100"].dataset) == NUM_TEST


def test_missing_and_damaged_files_are_reported(tmp_path):
    with pytest.raises(InputError) as info:
        MNISTDataModule(str(tmp_path)).setup("fit")
    assert str(info.value) == (
        f"The training files of MNIST must be in {tmp_path}, in torchvision's layout, but torchvision reports: Dataset not found. "
        "You can use download=True to download it"
    )
    with pytest.raises(InputError, match="The test files of CIFAR10 must be in .* Dataset not found or corrupted"):
        CIFAR10DataModule(str(tmp_path)).setup("test")
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(InputError, match="The training files of MNIST must be in"):
        MNISTDataModule(str(tmp_path)).setup("fit")
    with pytest.raises(InputError, match="`name` must be one of mnist, .*, but it is 'imagenet'"):
        load_images("imagenet", tmp_path, train=True)


def test_svhn_names_the_extra_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtraError, match=r"Reading SVHN needs scipy\. .* pip install 'lightning-uq\[data\]'"):
        SVHNDataModule(str(tmp_path)).setup("fit")
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert re.search(r"^data = \[.*scipy", project.read_text(), re.MULTILINE)


def test_downloads_happen_on_request(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append((type(self).__name__, len(self.resources)))
        part = "train" if "train" in self.resources[0][0] else "t10k"
        write_mnist(tmp_path, type(self).__name__, parts=[part])

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    MNISTDataModule(str(tmp_path)).prepare_data()
    assert asked == []
    data = MNISTDataModule(str(tmp_path), ood_datasets=["fashion_mnist"], download=True)
    data.prepare_data()
    assert asked == [("MNIST", 2), ("MNIST", 2), ("FashionMNIST", 2)]
    data.setup()
    assert len(gather(data.ood_dataloaders()["fashion_mnist"])[1]) == NUM_TEST


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MNISTDataModule(batch_size=0), "`batch_size` must be at least 1, but it is 0."),
        (
            lambda: MNISTDataModule(ood_datasets=["svhn"]),
            "`ood_datasets` of mnist must hold names from fashion_mnist, kmnist, whose images have the same size, "
            "but it holds 'svhn'.",
        ),
        (
            lambda: CIFAR10DataModule(ood_datasets=["cifar10"]),
            "`ood_datasets` of cifar10 must hold names from cifar100, svhn, whose images have the same size, but "
            "it holds 'cifar10'.",
        ),
        (
            lambda: DirtyMNISTDataModule(ambiguous="maybe"),
            "`ambiguous` must be 'auto', 'published' or 'generated', but it is 'maybe'.",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(InputError) as info:
        make()
    assert str(info.value) == message


# ------------------------------------------------------------------------------------------ Dirty-MNIST


def test_generated_ambiguous_digits(tmp_path):
    write_mnist(tmp_path)
    data = DirtyMNISTDataModule(str(tmp_path), num_generated=6)
    images, labels, rows = data.load_samples(train=True)
    assert data.ambiguous_source == "generated ambiguous digits"
    assert images.shape == (NUM_TRAIN + 6, 1, 28, 28)
    assert len(labels) == len(rows) == NUM_TRAIN + 60
    assert rows[NUM_TRAIN:].tolist() == [NUM_TRAIN + i // 10 for i in range(60)]
    assert all(len(set(ten.tolist())) <= 2 for ten in labels[NUM_TRAIN:].view(6, 10))
    train, val = shuffled_split(NUM_TRAIN + 60, 1)
    x, y = gather(data.uq_fit_dataloader())
    torch.testing.assert_close(x, (images[rows[train]].float() / 255 - 0.1307) / 0.3081)
    assert torch.equal(y, labels[train])
    assert len(data.dataset("val")) == len(val) == 10
    # Another split has the same digits; another generation seed has not; training and test digits differ.
    same = DirtyMNISTDataModule(str(tmp_path), num_generated=6, seed=2).load_samples(train=True)
    other = DirtyMNISTDataModule(str(tmp_path), num_generated=6, generation_seed=1).load_samples(train=True)
    test = data.load_samples(train=False)
    assert torch.equal(same[0], images)
    assert not torch.equal(other[0], images)
    assert not torch.equal(test[0][NUM_TEST:], images[NUM_TRAIN:])
    parts = {name: gather(loader) for name, loader in data.test_part_dataloaders().items()}
    x, y = gather(data.test_dataloader())
    assert torch.equal(torch.cat([parts["mnist"][0], parts["ambiguous"][0]]), x)
    assert len(parts["mnist"][1]) == NUM_TEST
    assert torch.equal(parts["ambiguous"][0][0], parts["ambiguous"][0][9])


def test_published_ambiguous_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(dirty_mnist, "NUM_AMBIGUOUS_TRAIN", 50)
    write_mnist(tmp_path)
    for folder in (tmp_path, tmp_path / "AmbiguousMNIST"):
        samples, labels = write_ambiguous(folder, seed=len(str(folder)))
        data = DirtyMNISTDataModule(str(tmp_path))
        x, y = gather(data.test_part_dataloaders()["ambiguous"])
        assert data.ambiguous_source == "published, another release"
        torch.testing.assert_close(x, (samples[5:].repeat_interleave(10, 0) - 0.1307) / 0.3081)
        assert torch.equal(y, labels[5:].flatten())
        images, all_labels, rows = data.load_samples(train=True)
        assert torch.equal(images[rows[NUM_TRAIN:]], samples[:5].repeat_interleave(10, 0))
        assert torch.equal(all_labels[NUM_TRAIN:], labels[:5].flatten())
        raw, _ = load_images("mnist", tmp_path, train=True)
        torch.testing.assert_close(images[:NUM_TRAIN], raw.float() / 255)
    sums = {
        name: hashlib.md5((tmp_path / "AmbiguousMNIST" / name).read_bytes()).hexdigest() for name in AMBIGUOUS_FILES
    }
    monkeypatch.setattr(ambiguous_digits, "AMBIGUOUS_FILES", sums)
    data.load_samples(train=True)
    assert data.ambiguous_source == "published"
    generated = DirtyMNISTDataModule(str(tmp_path), ambiguous="generated", num_generated=3)
    generated.setup("fit")
    assert generated.ambiguous_source == "generated ambiguous digits"


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        (
            torch.zeros(8, 28, 28),
            None,
            r"must hold floats \[M, 1, 28, 28\], but it is torch.float32 of shape \[8, 28, 28\]",
        ),
        (torch.zeros(8, 1, 28, 28).long(), None, r"must hold floats .* but it is torch.int64"),
        ({"x": 1}, None, "but it is a dict"),
        (torch.full((8, 1, 28, 28), 2.0), None, r"must hold values in \[0, 1\]"),
        (torch.full((8, 1, 28, 28), float("nan")), None, r"must hold values in \[0, 1\]"),
        (None, torch.zeros(7, 10).long(), r"must hold labels \[8, K\], but it is torch.int64 of shape \[7, 10\]"),
        (None, torch.full((8, 10), 10), "must hold digits 0 to 9"),
        (torch.zeros(5, 1, 28, 28), torch.zeros(5, 10).long(), "must hold more than 5 images, but it holds 5"),
    ],
)
def test_damaged_ambiguous_files_are_reported(samples, labels, message, tmp_path, monkeypatch):
    monkeypatch.setattr(dirty_mnist, "NUM_AMBIGUOUS_TRAIN", 50)
    write_mnist(tmp_path)
    write_ambiguous(tmp_path)
    if samples is not None:
        torch.save(samples, tmp_path / "amnist_samples.pt")
    if labels is not None:
        torch.save(labels, tmp_path / "amnist_labels.pt")
    with pytest.raises(InputError, match=message):
        DirtyMNISTDataModule(str(tmp_path)).setup("fit")


def test_missing_or_unreadable_ambiguous_files(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(InputError, match="amnist_samples.pt and amnist_labels.pt of Ambiguous-MNIST must be in"):
        DirtyMNISTDataModule(str(tmp_path), ambiguous="published").setup("fit")
    write_ambiguous(tmp_path)
    (tmp_path / "amnist_labels.pt").write_bytes(b"no tensor")
    with pytest.raises(InputError, match=r"amnist_labels.pt must hold a tensor, but it cannot be read"):
        DirtyMNISTDataModule(str(tmp_path)).setup("fit")


def test_blends_lie_between_two_digits_of_different_classes():
    generator = torch.Generator().manual_seed(0)
    # Each class has a pixel of its own, so that a blend tells its parents.
    labels = torch.arange(200) % 10
    digits = torch.zeros(200, 1, 28, 28, dtype=torch.uint8)
    digits[torch.arange(200), 0, 0, labels] = 250
    blends, drawn = blend_digits(digits, labels, 2000, 50, generator=generator)
    pixels = blends[:, 0, 0, :10].float() / 250
    assert ((pixels > 0).sum(1) == 2).all()
    assert ((pixels == 0) | ((pixels >= 0.398) & (pixels <= 0.602))).all()
    frequencies = nn.functional.one_hot(drawn, 10).float().mean(1)
    assert ((frequencies > 0) <= (pixels > 0)).all()
    assert (frequencies - pixels).abs().mean() < 0.02
    torch.testing.assert_close((frequencies - pixels).mean(0), torch.zeros(10), rtol=0, atol=0.005)
    with pytest.raises(InputError, match=r"`labels` must hold at least 2 classes to blend, but it holds \[3\]"):
        blend_digits(digits[:2], torch.tensor([3, 3]), 1)


# ------------------------------------------------------------------------------------------ in use


def test_a_batch_is_what_single_samples_are():
    raw = torch.randint(256, (6, 3, 5, 5), dtype=torch.uint8)
    data = ImageDataset(raw, torch.arange(6), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    together = data.__getitems__([4, 0, 4])
    for (x, y), i in zip(together, [4, 0, 4], strict=True):
        assert torch.equal(x, data[i][0])
        assert y == i
    x, y = next(iter(torch.utils.data.DataLoader(data, 6)))
    assert x.shape == (6, 3, 5, 5)
    assert y.tolist() == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lightning_trains_on_it(num_workers, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)

    class Linear(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
            self.rows = 0

        def training_step(self, batch, batch_idx):
            self.rows += len(batch[1])
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    net = Linear()
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(net, datamodule=CIFAR10DataModule(str(tmp_path), batch_size=16, num_workers=num_workers))
    assert net.rows == 36


def test_it_is_built_from_a_configuration():
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    path = f"{DirtyMNISTDataModule.__module__}.DirtyMNISTDataModule"
    config = parser.parse_object(
        {"data": {"class_path": path, "init_args": {"ood_datasets": ["kmnist"], "ambiguous": "generated"}}}
    )
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # the new and the old name
    data = instantiate(config)["data"]
    assert isinstance(data, DirtyMNISTDataModule)
    assert data.ood_datasets == ("kmnist",)


@pytest.mark.skipif(not (SHARED / "MNIST" / "raw").is_dir(), reason="the real images are not here")
def test_real_images(tmp_path):
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        for file in (SHARED / name / "raw").glob("t10k*.gz"):
            (tmp_path / name / "raw" / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    data = DirtyMNISTDataModule(str(tmp_path), ood_datasets=["fashion_mnist", "kmnist"], num_generated=100)
    x, y = gather(data.test_part_dataloaders()["mnist"])
    assert x.shape == (10_000, 1, 28, 28)
    assert x.mean().abs() < 0.01  # the constants are those of the training digits
    assert (x.std() - 1).abs() < 0.01
    assert y[:5].tolist() == [7, 2, 1, 0, 4]
    for name, loader in data.ood_dataloaders().items():
        labels = gather(loader)[1]
        assert labels.bincount().tolist() == [1000] * 10, name
    blends, labels = gather(data.test_part_dataloaders()["ambiguous"])
    assert len(blends) == 1000
    assert 0.5 < (labels.view(100, 10).mode(1).values.unsqueeze(1) == labels.view(100, 10)).float().mean() < 0.75
