"""The acquisition loop, round by round."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, EvidentialModule, InputError
from lightning_uq.active_learning import acquire, acquisition_rounds, score

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


def untrained(part):
    return EnsembleModule(network, num_members=4, seed=len(part))


def test_rounds_share_out_the_data():
    parts = []
    rounds = list(acquisition_rounds(lambda part: parts.append(part) or untrained(part), DATA, [7, 3], num=15))
    assert [len(done.labelled) for done in rounds] == [2, 17, 32, 40]
    for part, done, following in zip(parts, rounds, [*rounds[1:], None], strict=True):
        assert isinstance(part, Subset)
        assert list(part.indices) == done.labelled.tolist()
        assert sorted([*done.labelled.tolist(), *done.pool.tolist()]) == list(range(40))
        assert done.pool.tolist() == sorted(done.pool.tolist())
        assert done.scores.shape == done.pool.shape
        if following is not None:
            assert following.labelled.tolist() == [*done.labelled.tolist(), *done.acquired.tolist()]
    assert rounds[0].labelled.tolist() == [7, 3]
    assert (len(rounds[-1].pool), len(rounds[-1].acquired)) == (0, 0)


@pytest.mark.parametrize("name", ["mutual_information", "variance", "margin", "nll", "ucb"])
@pytest.mark.parametrize("batch_size", [7, 256])
def test_each_round_acquires_what_its_module_scores_highest(name, batch_size):
    done = next(acquisition_rounds(untrained, DATA, torch.tensor([0, 1]), 5, name, batch_size=batch_size))
    logits, labels = done.module(X[done.pool]), DATA.tensors[1][done.pool]
    torch.testing.assert_close(done.scores, score(name, logits, labels))
    assert done.acquired.tolist() == done.pool[acquire(name, logits, 5, labels)].tolist()


def test_options_reach_the_score():
    done = next(acquisition_rounds(untrained, DATA, [0], 5, "ucb", class_values=[0.0, 3.0], factor=0.0))
    torch.testing.assert_close(done.scores, 3 * done.module(X[done.pool]).softmax(2)[..., 1].mean(0))


def test_a_chance_acquisition_follows_its_generator():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        rounds = acquisition_rounds(untrained, DATA, [0], 9, "uniform", generator=generator, batch_size=4)
        return [done.acquired.tolist() for done in rounds]

    assert run(0) == run(0) != run(1)


def test_a_trainer_trains_each_round_and_labels_help(make_trainer):
    def train(part):
        torch.manual_seed(0)
        module = EnsembleModule(network, num_members=3, seed=0, optimizer=lambda p: torch.optim.Adam(p, lr=0.03))
        make_trainer(max_epochs=30).fit(module, DataLoader(part, batch_size=8))
        return module

    rounds = list(itertools.islice(acquisition_rounds(train, DATA, [0, 1], num=6), 4))
    first, *_, last = [float((done.module.predict(X).label == DATA.tensors[1]).double().mean()) for done in rounds]
    assert last > max(first, 0.9)


@pytest.mark.parametrize("module", [EvidentialModule, DeterministicModule], ids=lambda module: module.__name__)
def test_any_classifier_is_scored(module):
    done = next(acquisition_rounds(lambda part: module(network()), DATA, [0], 3, "predictive_entropy"))
    prediction = done.module.predict(X[done.pool])
    torch.testing.assert_close(done.scores, prediction.predictive_entropy.detach())
    assert not done.module.training


def test_mappings_are_read():
    data = [{"input": x, "target": y} for x, y in DATA]
    same = next(acquisition_rounds(untrained, DATA, [0], 3, "nll"))
    torch.testing.assert_close(next(acquisition_rounds(untrained, data, [0], 3, "nll")).scores, same.scores)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0}, "`num` must be an integer of at least 1, but it is 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, but it is 0"),
        ({"labelled": []}, r"`labelled` must hold integer positions, at least one, but it is \[\]"),
        ({"labelled": [0.5]}, "`labelled` must hold integer positions"),
        ({"labelled": torch.ones(40, dtype=torch.bool)}, "`labelled` must hold integer positions"),
        ({"labelled": [1, 1]}, r"`labelled` must hold distinct positions in \[0, 40\)"),
        ({"labelled": [40]}, r"`labelled` must hold distinct positions in \[0, 40\)"),
        ({"labelled": [-1]}, r"`labelled` must hold distinct positions in \[0, 40\)"),
        ({"score": "bold"}, "`name` must be one of uniform, .*, but it is 'bold'"),
        ({"tau": 3}, r"options of 'mutual_information' must be among \[\], but they are \['tau'\]"),
        ({"dataset": Stream()}, "`dataset` must have a length, but it is a Stream"),
    ],
)
def test_it_refuses_before_anything_is_trained(changes, message):
    arguments = {"train": lambda part: 1 / 0, "dataset": DATA, "labelled": [0], "num": 2, **changes}
    with pytest.raises(InputError, match=message):
        acquisition_rounds(**arguments)


def test_it_says_what_a_round_lacks():
    with pytest.raises(InputError, match="`train` must return a LightningModule, but it returned a NoneType"):
        next(acquisition_rounds(lambda part: None, DATA, [0], 2))
    many = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    with pytest.raises(InputError, match="return_members = True"):
        next(acquisition_rounds(lambda part: DropoutModule(many), DATA, [0], 2, "variance"))
