"""A filled configuration makes the same data again, whatever the data hold out."""

import pytest

from lightning_uq.compare import Configuration


@pytest.mark.parametrize("data", ["digits", "diabetes", "shapes"])
def test_a_filled_configuration_makes_its_data_again(data):
    configuration = Configuration(data=data, seeds=1)
    made = configuration.make_data(0)
    again = configuration.filled(made, ["softmax"]).make_data(0)
    assert again.ood_classes == made.ood_classes
    assert len(again.dataset("ood")) == len(made.dataset("ood"))
