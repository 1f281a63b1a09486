import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.importing import import_class, import_object


@pytest.mark.parametrize("path", ["torch.nn.Linear", "torch.nn:Linear"])
def test_both_ways_to_write_a_path_lead_to_one_object(path):
    assert import_object(path) is import_class(path, torch.nn.Module) is torch.nn.Linear


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("torch.nn.Linnear", "torch.nn has no Linnear, but it has Linear"),
        ("torch.nn:Linear.forwards", "torch.nn.Linear has no forwards, but it has forward"),
        ("torch.nm.Linear", "torch has no nm"),
        ("torhc:Linear", "there is no module torhc"),
        ("no.such.module.Linear", "there is no module no"),
        ("Linear", "it names no module, as `my.module:Name` does"),
        ("torch.pi", "torch.pi is a float"),
    ],
)
def test_the_error_names_the_part_that_is_missing(path, problem):
    with pytest.raises(InputError) as raised:
        import_class(path, torch.nn.Module, "network")
    assert str(raised.value).startswith(f"`network` must be the import path of a Module, but it is {path!r}: {problem}")


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(InputError, match="`data` must be the import path of a Module, but 'torch.Tensor' is not one"):
        import_class("torch.Tensor", torch.nn.Module, "data")
