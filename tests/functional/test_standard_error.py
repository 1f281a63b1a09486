import math

import pytest
import torch

from lightning_uq.functional.standard_error import standard_error, standard_errors


def test_it_is_the_sample_deviation_over_the_root_of_the_number():
    values = [0.5, 2.0, 4.0, 4.5]
    assert standard_errors(torch.tensor(values)).item() == pytest.approx(standard_error(values))
    assert standard_error(values) == pytest.approx(torch.tensor(values).std().item() / math.sqrt(4))


def test_one_value_has_none():
    assert standard_error([3.0]) is None
