import numpy as np
import pytest
import torch
from PIL import Image

from lightning_uq.data import ImageFolderDataModule, image_folder
from lightning_uq.errors import InputError


def write(folder, classes=("cat", "dog"), num=10, size=(6, 8), mode="RGB", suffix="png", seed=0):
    """``num`` images of each class: height and width, noise around a brightness that tells class and number."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            pixels = rng.integers(0, 20, (*size, 3)) + 100 * label + 5 * i
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
            image.save(folder / name / f"{i}.{suffix}")
    return folder


def batch(loader):
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_folders_of_classes_are_split_by_seed(tmp_path):
    data = ImageFolderDataModule(str(write(tmp_path / "pets")))
    assert (data.name, data.task, data.class_names, data.input_shape) == (
        "pets",
        "classification",
        ("cat", "dog"),
        (3, 6, 8),
    )
    assert (data.num_train, data.num_outputs, data.notes, data.ood_dataloaders()) == (12, 2, (), {})
    x, y = batch(data.train_dataloader())
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    assert y.bincount().tolist() == [6, 6]
    other = ImageFolderDataModule(str(tmp_path / "pets"), seed=1)
    assert not torch.equal(data.test_rows.sort().values, other.test_rows.sort().values)


def test_images_and_labels_stay_together(tmp_path):
    data = ImageFolderDataModule(str(write(tmp_path / "pets")))
    images, labels = data.load_arrays()
    x, y = batch(data.test_dataloader())
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in data._scale)
    torch.testing.assert_close(x * std + mean, images[data.test_rows])
    assert torch.equal(y, labels[data.test_rows])
    assert ((images.mean((1, 2, 3)) > 0.39).long() == labels).all()  # of the file, whose brightness tells the class


@pytest.mark.parametrize("limit", [2**30, 0])
def test_images_that_do_not_fit_into_memory_are_read_later(tmp_path, monkeypatch, limit):
    write(tmp_path / "pets")
    expected = batch(ImageFolderDataModule(str(tmp_path / "pets")).test_dataloader())
    monkeypatch.setattr(image_folder, "MEMORY_LIMIT", limit)
    data = ImageFolderDataModule(str(tmp_path / "pets"))
    assert isinstance(data.dataset("test").images, torch.Tensor) == (limit > 0)
    for one, other in zip(batch(data.test_dataloader()), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("parts", "sizes"), [("train val test", (16, 4, 4)), ("train test", (12, 4, 4)), ("train val", (12, 4, 4))]
)
def test_folders_of_parts_fix_the_split(tmp_path, parts, sizes):
    for i, part in enumerate(parts.split()):
        write(tmp_path / part, num=8 if part == "train" else 2, seed=i)
    data, other = (ImageFolderDataModule(str(tmp_path), seed=seed) for seed in (0, 1))
    assert tuple(len(data.dataset(part)) for part in ("train", "val", "test")) == sizes
    assert torch.equal(data.test_rows, other.test_rows) == ("test" in parts)
    if "test" in parts:
        assert data.test_rows.tolist() == list(range(data.test_rows.min(), data.test_rows.min() + 4))


def test_held_out_classes(tmp_path):
    data = ImageFolderDataModule(str(write(tmp_path / "pets", ("ant", "bee", "cat"))), ood_classes=["bee"])
    assert data.class_names == ("ant", "cat")
    (name, loader), *_ = data.ood_dataloaders().items()
    x, y = batch(loader)
    assert (name, x.shape, set(y.tolist())) == ("pets_bee", (10, 3, 6, 8), {1})
    binary = ImageFolderDataModule(str(tmp_path / "pets"), ood_classes=["bee"], task="binary")
    assert (binary.task, binary.num_outputs, binary.notes) == ("binary", 1, ("Label 1 stands for cat, and 0 for ant.",))


def test_grey_images_have_one_channel_and_mixed_ones_three(tmp_path):
    assert ImageFolderDataModule(str(write(tmp_path / "grey", mode="L"))).input_shape == (1, 6, 8)
    write(tmp_path / "mixed" / "a", ("x", "y"), mode="L")
    assert ImageFolderDataModule(str(write(tmp_path / "mixed" / "b", ("x", "y")).parent)).input_shape == (3, 6, 8)
    palette = ImageFolderDataModule(str(write(tmp_path / "palette", mode="P", suffix="gif")))
    assert palette.input_shape == (3, 6, 8)


def test_images_of_several_sizes_need_image_size(tmp_path):
    write(tmp_path / "train")
    write(tmp_path / "test", num=3, size=(12, 9))
    with pytest.raises(
        InputError, match="the same size, but there are 2 sizes, such as 6 x 8 and 12 x 9. Pass `image_size`"
    ):
        ImageFolderDataModule(str(tmp_path)).setup()
    data = ImageFolderDataModule(str(tmp_path), image_size=(4, 5))
    assert data.input_shape == (3, 4, 5)
    assert data.notes == ("Images of 2 sizes are resized to 4 x 5.",)
    assert ImageFolderDataModule(str(tmp_path), image_size=4).input_shape == (3, 4, 4)


def test_files_that_are_no_images(tmp_path):
    write(tmp_path / "pets")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("")
    (tmp_path / "pets" / "cat" / ".DS_Store").write_text("")
    (tmp_path / "pets" / ".cache").mkdir()
    data = ImageFolderDataModule(str(tmp_path / "pets"))
    assert data.notes == ("1 files are skipped, because their names are not those of images: notes.txt.",)
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"dog/3.png cannot be read as an image: cannot identify"):
        ImageFolderDataModule(str(tmp_path / "pets")).setup()
    whole = (tmp_path / "pets" / "dog" / "4.png").read_bytes()
    (tmp_path / "pets" / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"dog/3.png cannot be read as an image: .*truncated"):
        ImageFolderDataModule(str(tmp_path / "pets")).setup()
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(tmp_path / "pets" / "dog" / "3.png")
    with pytest.raises(InputError, match=r"dog/3.png must have 8 bits per channel, but its mode is I;16"):
        ImageFolderDataModule(str(tmp_path / "pets")).setup()


def test_folders_of_another_layout(tmp_path):
    for folder, message in (
        ("nowhere", "must be a folder of images, but .*nowhere is not a folder"),
        ("empty", "one subfolder of images per class, .* but it holds no folders"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            ImageFolderDataModule(str(tmp_path / folder)).setup()
    write(tmp_path / "pets")
    (tmp_path / "pets" / "cow").mkdir()
    with pytest.raises(InputError, match=r"pets/cow must hold images \(.jpg, .* but it holds 0 other files"):
        ImageFolderDataModule(str(tmp_path / "pets")).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "regression"}, "is a classification or binary task, but `task` is 'regression'"),
        ({"image_size": (1, 2, 3)}, r"`image_size` must be one or two numbers of at least 1, but it is \(1, 2, 3\)"),
        ({"image_size": 0}, "`image_size` must be one or two numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        ImageFolderDataModule("pets", **arguments)
