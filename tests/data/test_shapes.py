import pytest
import torch

from lightning_uq.data import ShapesDataModule, shapes
from lightning_uq.errors import InputError
from lightning_uq.networks import backbone
from lightning_uq.tasks import Segmentation, task_for


@pytest.fixture(scope="module")
def data():
    data = ShapesDataModule()
    data.setup()
    return data


def test_what_a_comparison_reads(data):
    assert (data.name, data.task, data.input_shape, data.num_outputs) == ("shapes", "segmentation", (3, 32, 32), 4)
    assert data.class_names == ("background", "disc", "square", "triangle")
    assert task_for(data) == Segmentation(num_classes=4, ignore_index=255)
    assert (data.num_train, len(data.test_rows), data.notes) == (150, 50, ())
    x, y = next(iter(data.train_dataloader()))
    outputs = backbone("unet", data.input_shape)(data.num_outputs)(x).unsqueeze(0)
    task_for(data).check_target(y, outputs)


def test_the_images_are_fixed_and_the_split_follows_the_seed(data):
    torch.manual_seed(7)
    other = ShapesDataModule(seed=1)
    assert not torch.equal(data.test_rows, other.test_rows)
    for one in (data, other):
        x, y = data.load_arrays()
        assert torch.equal(one.dataset("test").tensors[0], x[one.test_rows])
        assert torch.equal(one.dataset("test").tensors[1], y[one.test_rows])
    state = torch.get_rng_state()
    ShapesDataModule(num_images=10).setup()
    assert torch.equal(state, torch.get_rng_state())


def test_the_frame_does_not_count_and_every_class_does(data):
    for part in ("train", "val", "test"):
        y = data.dataset(part).tensors[1]
        assert (y[:, 0] == 255).all()
        assert (y[:, :, -1] == 255).all()
        assert y[:, 1:-1, 1:-1].unique().tolist() == [0, 1, 2, 3]


def test_pixels_of_a_cross_do_not_count(data):
    (name, loader), *others = data.ood_dataloaders().items()
    assert (name, others) == ("shapes_cross", [])
    y = torch.cat([y for _, y in loader])
    assert y.unique().tolist() == [0, 255]
    assert (y[:, 1:-1, 1:-1] == 255).flatten(1).any(1).all()


def test_labels_at_borders_are_noise_that_the_image_does_not_show(data, monkeypatch):
    x, y = data.load_arrays()
    monkeypatch.setattr(shapes, "BOLDNESS", 0.0)
    sharp_x, sharp_y = ShapesDataModule().load_arrays()
    assert torch.equal(x, sharp_x)
    shown = (sharp_y > 0) & (sharp_y < 255)
    assert 0.02 < (y != sharp_y)[shown].float().mean() < 0.3


def test_some_discs_and_squares_are_drawn_alike(data, monkeypatch):
    x, y = data.load_arrays()
    monkeypatch.setattr(shapes, "AMBIGUOUS", 0.0)
    plain_x, plain_y = ShapesDataModule().load_arrays()
    changed = (x != plain_x).flatten(1).any(1)
    assert 0.1 < changed[:250].float().mean() < 0.5
    assert not changed[250:].any()  # crosses
    assert not (y != plain_y)[:, [0, -1]].any()


def test_too_few_images():
    with pytest.raises(InputError, match="`num_images` must be at least 10, but it is 9"):
        ShapesDataModule(num_images=9)
