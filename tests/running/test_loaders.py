import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import Callback
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_uq.errors import InputError
from lightning_uq.modules.deterministic import DeterministicModule
from lightning_uq.running.loaders import (
    check_loader,
    exact_loader,
    fit_dataloader_of,
    loader_list,
    num_training_samples,
    reads_same_data,
    training_loader,
    validation_loaders,
)


def ranks(world):
    """Stand-ins for the Trainers of all ranks; a broadcast gives what the first rank, asked first, sent."""
    sent = []

    def broadcast(items, first):
        if first:
            sent.append(items)
        return sent[-1]

    return [
        SimpleNamespace(
            global_rank=r, world_size=world, strategy=SimpleNamespace(broadcast=lambda x, r=r: broadcast(x, r == 0))
        )
        for r in range(world)
    ]


def rows(loader):
    return [int(i) for (batch,) in loader for i in batch]


def dataset(n):
    return TensorDataset(torch.arange(n))


@settings(max_examples=40)
@given(n=st.integers(0, 23), size=st.integers(1, 7), world=st.integers(1, 4), drop_last=st.booleans())
def test_ranks_share_the_rows_without_padding_or_loss(n, size, world, drop_last):
    user = DataLoader(dataset(n), batch_size=size, drop_last=drop_last)
    for trainer in ranks(world):
        mine = exact_loader(user, trainer)
        assert rows(mine) == list(range(trainer.global_rank, n, world))
        assert all(len(batch) == size for (batch,) in list(mine)[:-1])


def subset(n):
    return SubsetRandomSampler([5, 1, 8, 2])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda d: DataLoader(d, 3, shuffle=True), range(10)),
        (lambda d: DataLoader(d, 3, sampler=RandomSampler(d, replacement=True)), range(10)),
        (lambda d: DataLoader(d, 3, sampler=DistributedSampler(d, 2, 1, shuffle=True, drop_last=True)), range(10)),
        (lambda d: DataLoader(d, 3, sampler=SubsetRandomSampler([5, 1, 8, 2])), [5, 1, 8, 2]),
        (
            lambda d: DataLoader(d, 3, sampler=DistributedSamplerWrapper(SubsetRandomSampler([5, 1, 8]), 2, 0)),
            [5, 1, 8],
        ),
        (lambda d: DataLoader(d, 3, sampler=[7, 7, 0]), [7, 7, 0]),
        (lambda d: DataLoader(d, batch_sampler=BatchSampler(SequentialSampler(d), 4, drop_last=True)), range(10)),
        (lambda d: DataLoader(d, batch_size=None), range(10)),
    ],
)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffling_is_undone_and_a_subset_kept(make, expected, world):
    seen = []
    for trainer in ranks(world):
        loader = exact_loader(make(dataset(10)), trainer)
        seen.append([int(i) for (batch,) in loader for i in batch.reshape(-1)])
        assert [batch.ndim for (batch,) in loader] == [0 if loader.batch_size is None else 1] * len(loader)
        assert loader.batch_size == getattr(make(dataset(10)).batch_sampler, "batch_size", None)
    assert seen == [list(expected)[r::world] for r in range(world)]


def test_random_draws_are_the_first_ranks_on_every_rank_and_move_no_generator():
    generator = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler(torch.ones(50), 9, generator=generator)
    user = DataLoader(dataset(50), batch_size=2, sampler=sampler)
    drawn = list(WeightedRandomSampler(torch.ones(50), 9, generator=torch.Generator().manual_seed(3)))
    before = generator.get_state()
    parts = [rows(exact_loader(user, trainer)) for trainer in ranks(2)]
    assert parts == [drawn[0::2], drawn[1::2]]
    assert torch.equal(generator.get_state(), before)
    few = DataLoader(dataset(50), sampler=RandomSampler(dataset(50), num_samples=5))
    parts = [rows(exact_loader(few, trainer)) for trainer in ranks(2)]
    assert len(set(parts[0] + parts[1])) == 5


class Buckets(BatchSampler):
    """Batches of different sizes, the last one dropped where it is short."""

    def __iter__(self):
        ids = list(self.sampler)
        cuts = [ids[:2], ids[2:5], ids[5:9], ids[9:]]
        yield from (cut for cut in cuts if not self.drop_last or len(cut) > 1)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_users_batches_stay_whole_and_none_is_dropped(distributed):
    data = dataset(10)
    inner = DistributedSampler(data, 2, 0, shuffle=False) if distributed else SequentialSampler(data)
    user = DataLoader(data, batch_sampler=Buckets(inner, 2, drop_last=True))
    parts = [[b.tolist() for (b,) in exact_loader(user, trainer)] for trainer in ranks(2)]
    assert parts == [[[0, 1], [5, 6, 7, 8]], [[2, 3, 4], [9]]]
    assert user.batch_sampler.drop_last
    assert user.batch_sampler.sampler is inner


def test_the_users_settings_are_kept():
    user = DataLoader(
        dataset(7), 3, num_workers=1, collate_fn=lambda items: len(items), prefetch_factor=4, persistent_workers=True
    )
    mine = exact_loader(user)
    assert list(mine) == [3, 3, 1]
    assert mine.num_workers == 1
    assert mine.prefetch_factor == 4


@pytest.mark.parametrize(
    ("limit", "batches"), [(None, 4), (1, 1), (3, 3), (9, 4), (1.0, 4), (0.5, 2), (0.1, 1), (0, 0)]
)
def test_limit_counts_batches(limit, batches):
    user = DataLoader(dataset(10), batch_size=3)
    assert rows(exact_loader(user, limit=limit)) == list(range(min(10, 3 * batches)))
    assert len(list(exact_loader([1, 2, 3, 4], limit=limit))) == batches
    stream = Stream() if not isinstance(limit, float) or limit == 1 else Sized()
    assert len(list(exact_loader(DataLoader(stream, batch_size=3), limit=limit))) == batches
    whole = DataLoader(dataset(10), batch_sampler=Buckets(SequentialSampler(range(10)), 2, drop_last=False))
    assert len(list(exact_loader(whole, limit=limit))) == batches


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


class Sized(Stream):
    def __len__(self):
        return 10


def test_a_share_of_a_stream_is_an_error():
    with pytest.raises(
        InputError, match=r"`ood\['a'\]` has no length, so a limit .* must be an integer, but it is 0.5"
    ):
        exact_loader(DataLoader(Stream()), name="`ood['a']`", limit=0.5)


class OwnIteration(DataLoader):
    def __iter__(self):
        return (batch * 10 for (batch,) in super().__iter__())


def test_streams_and_own_iterations_are_read_as_they_are():
    assert [b.tolist() for b in exact_loader(DataLoader(Stream(), batch_size=6))] == [[*range(6)], [*range(6, 10)]]
    user = OwnIteration(dataset(4), batch_size=2)
    assert [b.tolist() for b in exact_loader(user)] == [[0, 10], [20, 30]]
    for trainer in ranks(2):
        with pytest.warns(UserWarning, match="reads `x` unchanged"):
            assert len(list(exact_loader(user, trainer, name="`x`"))) == 2


def test_a_list_of_batches_is_shared_out():
    assert [list(exact_loader([1, 2, 3], trainer)) for trainer in ranks(2)] == [[1, 3], [2]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dataset(3), "but its type is TensorDataset; wrap the data set in a DataLoader"),
        (torch.zeros(3), "but its type is Tensor."),
        ({"a": 1}, "but its type is dict."),
        ("path", "but its type is str."),
        (3, "but its type is int."),
        (None, "but its type is NoneType."),
        ((i for i in range(3)), "but its type is generator, which can be read only once"),
    ],
)
def test_what_is_no_loader_is_refused(wrong, message):
    with pytest.raises(InputError, match=r"`ood\['a'\]` must be a DataLoader.*" + re.escape(message)):
        check_loader(wrong, "`ood['a']`")


def test_the_trainers_loaders_are_found_before_during_and_after_a_training(make_trainer):
    seen = []

    class Look(Callback):
        def look(self, trainer, pl_module):
            seen.append((training_loader(trainer), validation_loaders(trainer)))

        on_fit_start = on_train_start = on_train_end = look

    module = DeterministicModule(torch.nn.Linear(1, 2))
    trainer = make_trainer(callbacks=[Look()])
    for number in (1, 2):  # the second training of one Trainer has loaders of its own
        train, val = ([(torch.zeros(2, 1), torch.tensor([0, 1]))] for _ in range(2))
        train, val = DataLoader(train, batch_size=None), DataLoader(val, batch_size=None)
        trainer.fit_loop.max_epochs = number
        trainer.fit(module.train(), train, [val])
        assert seen == [(train, [val])] * 3
        seen.clear()
    make_trainer(callbacks=[Look()], limit_val_batches=0).fit(module.train(), train, [val])
    assert seen == [(train, [])] * 3
    assert loader_list(None) == []
    assert loader_list({"a": train, "b": val}) == [train, val]


def test_loaders_of_the_same_rows():
    data, other = dataset(6), dataset(6)
    parts = [DataLoader(data, sampler=SubsetRandomSampler(rows)) for rows in ([0, 1, 2], [3, 4, 5], [2, 3])]
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([3, 4, 5]), num_replicas=2, rank=0)
    assert reads_same_data(DataLoader(data), DataLoader(data, shuffle=True))
    assert reads_same_data(data, data)
    assert reads_same_data(parts[0], parts[2])
    assert reads_same_data(DataLoader(data), parts[0])
    assert not reads_same_data(DataLoader(data), DataLoader(other))
    assert not reads_same_data(*parts[:2])
    assert not reads_same_data(parts[0], DataLoader(data, sampler=wrapped))
    assert not reads_same_data([parts[0]], parts[0])


def test_the_data_for_a_fit_after_training_and_their_number():
    data = SimpleNamespace(uq_fit_dataloader=lambda: "loader")
    assert fit_dataloader_of(data)() == "loader"
    assert fit_dataloader_of(None) is None
    assert num_training_samples(SimpleNamespace(train_dataloader=DataLoader(dataset(7), batch_size=2))) == 7
    several = SimpleNamespace(train_dataloader=[DataLoader(dataset(7))])
    with pytest.raises(InputError, match=r"The training data have no length \(.*\)\. Pass `num_train`\."):
        num_training_samples(several)
