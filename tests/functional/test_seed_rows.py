import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.functional.seed_rows import SeedRows

IDS = torch.tensor([3, 1, 8])


def test_equal_ids_in_any_order_are_one_test_set():
    rows = SeedRows([IDS, IDS.flip(0)])
    assert rows.is_fixed
    assert rows.variance_share() == 1 / 2
    assert [at.tolist() for at in rows.positions] == [[1, 0, 2], [2, 0, 1]]


def test_one_seed_is_a_fixed_test_set():
    assert SeedRows([IDS]).is_fixed


def test_strata_are_rows_of_their_own():
    """Row 1 in distribution is not row 1 out of it; the rows out of distribution are the same for both seeds."""
    kinds = torch.tensor([False, False, False, True, True])
    outside = torch.tensor([1, 2])
    rows = SeedRows([torch.cat([IDS, outside]), torch.cat([IDS + 1, outside])], [kinds, kinds], num_train=12)
    assert not rows.is_fixed
    assert rows.is_common.tolist() == [False, True]
    assert rows.num_rows == 6 + 2
    assert rows.sizes.tolist() == [[3, 2], [3, 2]]
    assert rows.fewest == 2
    assert rows.variance_share() == 1 / 2 + 3 / 12  # those that are the same for all seeds do not count


def test_splits_may_differ_in_size():
    rows = SeedRows([torch.arange(4), torch.arange(3, 9)], num_train=20)
    assert rows.fewest == 4
    assert rows.variance_share() == 1 / 2 + 5 / 20


def test_a_smaller_split_is_not_fixed():
    assert not SeedRows([torch.arange(4), torch.arange(3)]).is_fixed


def test_equality_is_that_of_rows_and_order():
    rows = SeedRows([IDS, IDS + 1], num_train=9)
    assert rows == SeedRows([IDS.int(), IDS + 1], num_train=9)
    assert rows != SeedRows([IDS + 5, IDS + 6], num_train=9)
    assert rows != SeedRows([IDS.flip(0), IDS + 1], num_train=9)
    assert rows != SeedRows([IDS, IDS + 1], num_train=8)
    assert rows != SeedRows([IDS], num_train=9)
    assert rows != "rows"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SeedRows([]), "`ids` is empty."),
        (lambda: SeedRows([IDS, IDS.float()]), "`ids[1]` must be a tensor of integers [N]"),
        (lambda: SeedRows([IDS, [1, 2]]), "`ids[1]` must be a tensor of integers [N], but it is a list."),
        (lambda: SeedRows([IDS], [IDS[None]]), "`strata[0]` must be a tensor of integers [N]"),
        (
            lambda: SeedRows([IDS], [IDS[:2]]),
            "`strata` must name the stratum of each row: [3] rows per seed, but it has [2]",
        ),
        (lambda: SeedRows([IDS, IDS], [IDS]), "`strata` must name the stratum of each row: [3, 3] rows per seed"),
        (lambda: SeedRows([IDS, torch.tensor([1, 2, 1])]), "`ids[1]` repeats 1 rows."),
        (lambda: SeedRows([IDS, IDS[:1]]), "Seed 1 has 1 test row of a stratum. An interval needs at least two rows."),
        (lambda: SeedRows([IDS, IDS], [IDS > 0, IDS > 1]), "Seed 0 has 0 test row of a stratum."),
        (lambda: SeedRows([IDS], num_train=0), "`num_train` must be an integer of at least 1"),
        (
            lambda: SeedRows([IDS, IDS + 1]).variance_share(),
            "Pass `num_train`, the number of training rows of a split: each seed has its own test rows",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value).startswith(message)
