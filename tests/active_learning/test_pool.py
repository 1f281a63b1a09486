"""The data module of a pool: its parts, its checkpoints, and the same picks on every process."""

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from lightning_uq import DeterministicModule, EnsembleModule, FitGMM, InputError, TemperatureScaling, UnsupportedError
from lightning_uq.active_learning import (
    EPIG,
    STRATEGIES,
    BatchBALD,
    ByScore,
    DensityThenEntropy,
    PoolDataModule,
    Strategy,
    balanced_positions,
    core_set,
)

X = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())


def network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


def ensemble():
    return EnsembleModule(network, num_members=4, seed=1, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))


def inputs(loader):
    return torch.cat([x for x, _ in loader])


def test_loaders_hold_their_parts():
    data = PoolDataModule(DATA, [7, 3, 12], val=DATA, batch_size=2)
    train, pool = inputs(data.train_dataloader()), inputs(data.predict_dataloader())
    assert sorted(map(tuple, train.tolist())) == sorted(map(tuple, X[[7, 3, 12]].tolist()))
    assert pool.tolist() == X[data.pool].tolist()
    assert len(data.pool) == 37
    assert inputs(data.val_dataloader()).tolist() == X.tolist()


def test_an_epoch_may_have_a_fixed_length_in_which_all_come_equally_often():
    data = PoolDataModule(DATA, [7, 3, 12], batch_size=4, samples_per_epoch=9)
    train = inputs(data.train_dataloader())
    assert sorted(map(tuple, train.tolist())) == sorted(map(tuple, X[[7, 3, 12] * 3].tolist()))
    first, second = (inputs(data.train_dataloader()).tolist() for _ in range(2))
    assert first == second  # of the seed


def test_a_density_is_fitted_to_each_labelled_sample_once(make_trainer):
    data = PoolDataModule(DATA, 20, batch_size=4, samples_per_epoch=101)
    module = DeterministicModule(network(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    alone = copy.deepcopy(module)
    make_trainer(max_epochs=1, callbacks=[FitGMM()]).fit(module, data)
    FitGMM().fit(alone, PoolDataModule(DATA, data.labelled, batch_size=4).train_dataloader())
    torch.testing.assert_close(module.predict(X).log_density, alone.predict(X).log_density, rtol=1e-4, atol=1e-4)


def test_a_fixed_length_is_refused_on_several_processes():
    data = PoolDataModule(DATA, [7, 3, 12], samples_per_epoch=9)
    data.trainer = SimpleNamespace(world_size=1)
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(UnsupportedError, match="`samples_per_epoch` works on one process only, but the Trainer has 2"):
        data.setup("fit")
    data.samples_per_epoch = None
    data.setup("fit")


def test_an_empty_reference_is_an_error():
    with pytest.raises(InputError, match="EPIG has no inputs to read: its `reference` is empty"):
        PoolDataModule(DATA, [7, 3]).acquire(ensemble(), 2, EPIG(TensorDataset(X[:0])))


def test_positions_at_random_come_from_the_seed():
    first, second, other = (PoolDataModule(DATA, 5, seed=seed).labelled.tolist() for seed in (0, 0, 1))
    assert first == second != other
    assert len(set(first)) == 5


def test_balanced_positions_have_as_many_of_each_class():
    labels = torch.arange(40) % 3
    found = balanced_positions(labels, 4, seed=1)
    assert torch.bincount(labels[found]).tolist() == [4, 4, 4]
    assert len(found.unique()) == 12
    assert found.tolist() != balanced_positions(labels, 4, seed=2).tolist()
    with pytest.raises(InputError, match="`per_class` is 14, but class 1 has only 13"):
        balanced_positions(labels, 14)


START = [7, 3, 0, 2]  # two of each class, which a density needs


@pytest.mark.parametrize("name", [*STRATEGIES, "mutual_information", "energy"])
def test_every_strategy_acquires_from_the_pool(name, make_trainer):
    data = PoolDataModule(DATA, START, val=DATA, batch_size=8)
    module = ensemble()
    make_trainer(max_epochs=30, callbacks=[FitGMM(), TemperatureScaling()]).fit(module, data)
    pool = set(data.pool.tolist())
    acquired = data.acquire(module, 5, name, batch_size=7)
    assert len(set(acquired.tolist())) == 5
    assert set(acquired.tolist()) <= pool
    assert data.labelled.tolist() == [*START, *acquired.tolist()]
    assert data.initial == 4


@pytest.mark.parametrize("strategy", [*STRATEGIES, "margin"])
def test_batch_sizes_do_not_matter(strategy):
    module = ensemble()
    FitGMM().fit(module, PoolDataModule(DATA, 30).train_dataloader())
    found = [PoolDataModule(DATA, [7, 3]).acquire(module, 6, strategy, batch_size=size).tolist() for size in (3, 256)]
    assert found[0] == found[1]


def test_low_densities_are_acquired_first():
    module = DeterministicModule(network())
    FitGMM().fit(module, PoolDataModule(DATA, 30).train_dataloader())
    data = PoolDataModule(DATA, [7, 3])
    density = module.predict(X[data.pool]).log_density
    expected = data.pool[density.argsort()[:4]].tolist()
    assert data.acquire(module, 4, "log_density").tolist() == expected


def test_densities_that_underflow_still_rank():
    strategy = DensityThenEntropy(shortlist=2)
    rows = torch.tensor([4000.0, 9000.0, 5000.0]), torch.tensor([0.6, 0.1, 0.5])
    assert strategy.choose(rows, 1, None, torch.Generator()).tolist() == [2]
    assert strategy.choose(rows, 3, None, torch.Generator()).tolist() == [0, 2, 1]


def test_a_core_set_reads_the_features_of_both_parts():
    module = DeterministicModule(network())
    data = PoolDataModule(DATA, [7, 3])
    features = module.network.network[:2](X) if hasattr(module.network, "network") else None
    assert features is not None
    expected = data.pool[core_set(features[data.pool], features[data.labelled], 4)].tolist()
    assert data.acquire(module, 4, "core_set").tolist() == expected


def test_targets_of_epig_are_a_data_set():
    module = ensemble()
    targets = TensorDataset(X[:5])
    first = PoolDataModule(DATA, [7, 3]).acquire(module, 4, EPIG(targets)).tolist()
    second = PoolDataModule(DATA, [7, 3]).acquire(module, 4, EPIG(TensorDataset(X[5:10] * 9))).tolist()
    assert first != second


def test_a_regressor_is_scored_by_its_own_scores():
    from lightning_uq import Regression

    module = EnsembleModule(network, num_members=3, seed=0, task=Regression())
    data = PoolDataModule(TensorDataset(X, X[:, :1]), [0])
    variance = module.predict(X[data.pool]).score("epistemic_variance")
    assert (
        data.acquire(module, 3, "epistemic_variance").tolist() == (variance.argsort(descending=True)[:3] + 1).tolist()
    )


def test_a_function_may_be_the_score():
    data = PoolDataModule(DATA, [7, 3])
    module = ensemble()
    expected = data.pool[module.predict(X[data.pool]).probs[:, 1].argsort(descending=True)[:3]].tolist()
    assert data.acquire(module, 3, ByScore(lambda prediction: prediction.probs[:, 1])).tolist() == expected


def test_modes_and_random_states_are_left_alone():
    module = ensemble()
    module.train()
    state = torch.get_rng_state()
    PoolDataModule(DATA, [7, 3]).acquire(module, 3, BatchBALD(num_samples=4))
    assert module.training
    assert torch.equal(state, torch.get_rng_state())


def test_a_checkpoint_holds_the_order(make_trainer):
    data = PoolDataModule(DATA, [7, 3], batch_size=8)
    data.acquire(ensemble(), 5)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(ensemble(), data)
    path = Path(trainer.default_root_dir) / "pool.ckpt"
    trainer.save_checkpoint(path)
    other = PoolDataModule(DATA, [1], batch_size=8)
    make_trainer(max_epochs=2).fit(ensemble(), other, ckpt_path=path)
    assert other.labelled.tolist() == data.labelled.tolist()
    assert other.initial == 2
    with pytest.raises(InputError, match="data set of 40 samples, but `dataset` has 9"):
        PoolDataModule(TensorDataset(X[:9]), [1]).load_state_dict(data.state_dict())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DATA, []), r"`labelled` must hold positions, at least one, but it holds \[\]"),
        ((DATA, [0.5]), "`labelled` must hold positions"),
        ((DATA, torch.ones(40, dtype=torch.bool)), "`labelled` must hold positions"),
        ((DATA, [1, 1]), r"`labelled` must hold distinct positions in \[0, 40\)"),
        ((DATA, [40]), r"`labelled` must hold distinct positions in \[0, 40\)"),
        ((DATA, [-1]), r"`labelled` must hold distinct positions in \[0, 40\)"),
        ((DATA, 41), r"`labelled` must be in \[1, 40\], but it is 41"),
        ((Stream(), [0]), "`dataset` must have a length, but it is a Stream"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        PoolDataModule(*arguments)


def test_labels_that_are_taken_are_refused():
    data = PoolDataModule(DATA, [7, 3])
    with pytest.raises(InputError, match="distinct positions"):
        data.label([7])
    assert data.labelled.tolist() == [7, 3]


def test_an_empty_pool_is_an_error():
    with pytest.raises(InputError, match="The pool is empty: all 40 positions are labelled"):
        PoolDataModule(DATA, 40).acquire(ensemble(), 1)


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def predict_step(self, batch, batch_idx):
        return self.network(batch[0])


def test_an_unmodified_module_says_what_it_lacks():
    with pytest.raises(InputError, match=r"`predict_step` of Plain returned a Tensor. Pass `attach=True`"):
        PoolDataModule(TensorDataset(X), [7, 3]).acquire(Plain(), 3, "margin")


def test_nan_is_named():
    class Broken(Strategy):
        def rows(self, batch):
            return (torch.full((len(batch),), torch.nan),)

        def choose(self, pool, num, reference, generator):
            raise AssertionError

    with pytest.raises(InputError, match="Broken read NaN"):
        PoolDataModule(DATA, [7, 3]).acquire(ensemble(), 3, Broken())


TWO = """
import json, torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import TensorDataset
from lightning_uq import EnsembleModule, FitGMM
from lightning_uq.active_learning import PoolDataModule, STRATEGIES

X = torch.randn(41, 2, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, (X[:, 0] > 0).long())

START = [7, 3, 0, 1, 2, 5]

def network():
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))

def main(devices):
    found = {}
    for name in [*STRATEGIES, "mutual_information"]:
        data = PoolDataModule(DATA, START, batch_size=4)
        module = EnsembleModule(network, num_members=3, seed=0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        trainer = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[FitGMM()])
        trainer.fit(module, data)
        found[name] = [data.acquire(module, num, name, batch_size=8).tolist() for num in (4, 26, 5)]
    if devices > 1:
        every = [None] * 2
        torch.distributed.all_gather_object(every, found)
        assert every[0] == every[1]
    return found

if __name__ == "__main__":
    found = main(DEVICES)
    import os
    if os.environ.get("LOCAL_RANK", "0") == "0":
        json.dump(found, open(out, "w"))
"""


def test_two_processes_pick_what_one_picks(run_script):
    one = run_script(TWO.replace("DEVICES", "1"))
    two = run_script(TWO.replace("DEVICES", "2"))
    assert one == two
    assert all(sorted([7, 3, 0, 1, 2, 5, *itertools.chain(*picks)]) == list(range(41)) for picks in one.values())
