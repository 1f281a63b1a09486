"""The acquisition loop, round by round."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_uq import DeterministicModule, DropoutModule, EnsembleModule, EvidentialModule, InputError
from lightning_uq.active_learning import ByScore, PoolDataModule, acquire, acquisition_rounds, score

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


def untrained(data):
    return EnsembleModule(network, num_members=4, seed=len(data.labelled))


def test_rounds_share_out_the_data():
    parts = []
    data = PoolDataModule(DATA, [7, 3])
    rounds = list(
        acquisition_rounds(lambda data: parts.append(data.labelled.tolist()) or untrained(data), data, num=15)
    )
    assert [len(done.labelled) for done in rounds] == [2, 17, 32, 40]
    assert [done.number for done in rounds] == [0, 1, 2, 3]
    for part, done, following in zip(parts, rounds, [*rounds[1:], None], strict=True):
        assert part == done.labelled.tolist()
        if following is not None:
            assert following.labelled.tolist() == [*done.labelled.tolist(), *done.acquired.tolist()]
    assert rounds[0].labelled.tolist() == [7, 3]
    assert sorted(rounds[-1].labelled.tolist()) == list(range(40))
    assert not len(rounds[-1].acquired)
    assert not len(data.pool)


@pytest.mark.parametrize("name", ["mutual_information", "variance", "margin", "nll", "ucb"])
@pytest.mark.parametrize("batch_size", [7, 256])
def test_each_round_acquires_what_its_module_scores_highest(name, batch_size):
    data = PoolDataModule(DATA, torch.tensor([0, 1]))
    pool = data.pool
    done = next(acquisition_rounds(untrained, data, 5, name, batch_size=batch_size))
    logits, labels = done.module(X[pool]), DATA.tensors[1][pool]
    assert done.acquired.tolist() == pool[acquire(name, logits, 5, labels)].tolist()


def test_options_reach_the_score():
    data = PoolDataModule(DATA, [0])
    pool = data.pool
    done = next(acquisition_rounds(untrained, data, 5, ByScore("ucb", class_values=[0.0, 3.0], factor=0.0)))
    values = 3 * done.module(X[pool]).softmax(2)[..., 1].mean(0)
    assert done.acquired.tolist() == pool[values.argsort(descending=True, stable=True)[:5]].tolist()


@pytest.mark.parametrize(
    "strategy", ["random", "badge", ByScore("variance", "softmax")], ids=["random", "badge", "softmax"]
)
def test_chance_follows_the_seed_and_not_the_global_generator(strategy):
    def run(seed):
        torch.rand(1)  # moves the global generator
        rounds = acquisition_rounds(untrained, PoolDataModule(DATA, [0], seed=seed), 9, strategy, batch_size=4)
        return [done.acquired.tolist() for done in rounds]

    assert run(0) == run(0) != run(1)


def test_a_trainer_trains_each_round_and_labels_help(make_trainer):
    def train(data):
        torch.manual_seed(0)
        module = EnsembleModule(network, num_members=3, seed=0, optimizer=lambda p: torch.optim.Adam(p, lr=0.03))
        make_trainer(max_epochs=30).fit(module, data)
        return module

    data = PoolDataModule(DATA, [0, 1], batch_size=8)
    rounds = list(itertools.islice(acquisition_rounds(train, data, num=6), 4))
    first, *_, last = [float((done.module.predict(X).label == DATA.tensors[1]).double().mean()) for done in rounds]
    assert last > max(first, 0.9)


@pytest.mark.parametrize("module", [EvidentialModule, DeterministicModule], ids=lambda module: module.__name__)
def test_any_classifier_is_scored(module):
    data = PoolDataModule(DATA, [0])
    pool = data.pool
    done = next(acquisition_rounds(lambda data: module(network()), data, 3, "predictive_entropy"))
    entropy = done.module.predict(X[pool]).predictive_entropy
    assert done.acquired.tolist() == pool[entropy.argsort(descending=True)[:3]].tolist()


def test_mappings_are_read():
    data = [{"input": x, "target": y} for x, y in DATA]
    found = [
        next(acquisition_rounds(untrained, PoolDataModule(one, [0]), 3, "nll")).acquired.tolist()
        for one in (data, DATA)
    ]
    assert found[0] == found[1]


def test_a_loop_that_crashed_goes_on_with_the_same_picks(tmp_path):
    def picks(folder, rounds):
        loop = acquisition_rounds(untrained, PoolDataModule(DATA, [7, 3]), 9, "badge", folder=folder)
        return [(done.number, done.acquired.tolist()) for done in itertools.islice(loop, rounds)]

    whole = picks(tmp_path / "whole", None)
    before = picks(tmp_path / "part", 2)
    trained = []

    def crashing(data):
        if trained:
            raise RuntimeError("power cut")
        trained.append(1)
        return untrained(data)

    with pytest.raises(RuntimeError, match="power cut"):
        list(acquisition_rounds(crashing, PoolDataModule(DATA, [7, 3]), 9, "badge", folder=tmp_path / "part"))
    after = picks(tmp_path / "part", None)
    assert len(before) == 2
    assert [number for number, _ in after] == [3, 4, 5]
    assert before == whole[:2]
    assert after == whole[3:]
    assert picks(tmp_path / "part", None) == []  # nothing is left to do
    files = [json.loads((tmp_path / "part" / f"round-{k}.json").read_text()) for k in range(6)]
    assert [one["acquired"] for one in files] == [acquired for _, acquired in whole]
    assert not list((tmp_path / "part").glob("*partial*"))


def test_rounds_of_another_experiment_are_not_continued(tmp_path):
    next(acquisition_rounds(untrained, PoolDataModule(DATA, [7, 3]), 9, folder=tmp_path))
    for data, num in [(PoolDataModule(DATA, [3, 7]), 9), (PoolDataModule(DATA, [7, 3]), 8)]:
        with pytest.raises(InputError, match="`folder` holds rounds of another experiment"):
            next(acquisition_rounds(untrained, data, num, folder=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 0}, "`num` must be an integer of at least 1, but it is 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1, but it is 0"),
        ({"strategy": "bold"}, "`name` must be one of uniform, .*vacuity.*, but it is 'bold'"),
    ],
)
def test_it_refuses_before_anything_is_trained(changes, message):
    arguments = {"train": lambda data: 1 / 0, "data": PoolDataModule(DATA, [0]), "num": 2, **changes}
    with pytest.raises(InputError, match=message):
        acquisition_rounds(**arguments)


def test_options_that_a_score_does_not_have_are_refused():
    with pytest.raises(InputError, match=r"options of 'mutual_information' must be among \[\], but they are \['tau'\]"):
        ByScore("mutual_information", tau=3)
    with pytest.raises(InputError, match=r"The options \['tau'\] belong to a named score"):
        ByScore(lambda prediction: prediction.max_softmax, tau=3)


def test_the_error_says_what_a_round_lacks():
    with pytest.raises(InputError, match="`train` must return a LightningModule, but it returned a NoneType"):
        next(acquisition_rounds(lambda data: None, PoolDataModule(DATA, [0]), 2))
    many = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    with pytest.raises(InputError, match="return_members = True"):
        next(acquisition_rounds(lambda data: DropoutModule(many), PoolDataModule(DATA, [0]), 2, "variance"))


def test_a_score_of_logits_alone_is_refused():
    with pytest.raises(InputError, match="The score 'vacuity' needs a prediction, but `outputs` holds logits"):
        score("vacuity", torch.zeros(1, 2, 3))
