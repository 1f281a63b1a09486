"""Fits on iterable data sets that workers and ranks divide: the result of a data set of the same rows in one process, in constant memory."""

import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lightning_uq import ConformalIntervals, ConformalSets, FitGMM, TemperatureScaling
from lightning_uq.errors import InputError
from lightning_uq.functional.held_out_scores import HeldOutScores
from lightning_uq.running import temperature_reader
from lightning_uq.running.row_sample import RowSample, row_keys
from lightning_uq.tasks import Regression
from tests.contract import cases
from tests.counting import peak_bytes

N = 61  # on two ranks with two workers each: the ranks have different numbers of batches

CLASSES, NUMBERS = (cases.dataset(name, N, 1) for name in ("classification", "regression"))


class Divided(IterableDataset):
    """Rows that ranks and workers divide, each in its own order."""

    def __init__(self, data, rank=0, world=1, *, has_index=True):
        self.data, self.rank, self.world, self.has_index = data, rank, world, has_index

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(self.rank * workers + number, len(self.data), self.world * workers):
            x, y = self.data[i]
            yield {"input": x, "target": y, "index": i} if self.has_index else (x, y)


def fits():
    """Callbacks with their data. ``max_rows`` is below the number of rows, so that the sample has to be the same too."""
    return {
        "gmm": (FitGMM(feature_transform="raw"), CLASSES),
        "combined": (FitGMM(), CLASSES),
        "mixture": (FitGMM(feature_transform="raw", num_components=2), CLASSES),
        "temperature": (TemperatureScaling(), CLASSES),
        "members": (TemperatureScaling(scope="member", max_rows=40), CLASSES),
        "sets": (ConformalSets(alpha=0.3), CLASSES),
        "sampled sets": (ConformalSets(alpha=0.3, max_rows=40), CLASSES),
        "intervals": (ConformalIntervals(alpha=0.3, task=Regression(head="mean")), NUMBERS),
    }


def modules():
    """A classifier whose logits show the class, and a regressor."""
    torch.manual_seed(3)
    classifier = cases.UsersModule().double()
    with torch.no_grad():
        classifier.net[0].weight.add_(2 * torch.eye(8, cases.FEATURES))
        classifier.net[-1].weight.copy_(torch.eye(cases.CLASSES, 8))
    return {id(CLASSES): classifier, id(NUMBERS): cases.UsersRegressor().double()}


def tensors_of(callback):
    """The fitted tensors, with the scores of rows in ascending order."""
    state = callback.state_dict()["tensors"]
    return {name: one.sort(0).values if name == "scores" else one for name, one in state.items()}


def loader_of(data, *, workers=0, stream=True, **divided):
    if not stream:
        return DataLoader(data, batch_size=8)
    return DataLoader(Divided(data, **divided), batch_size=4, num_workers=workers)


def fitted(**options):
    """The tensors of each callback, fitted without a Trainer."""
    models = modules()
    found = {}
    for name, (callback, data) in fits().items():
        if name == "combined":
            callback.coordinates.held_out.given = loader_of(cases.dataset("classification", 30, 2), **options)
        found[name] = tensors_of(callback.fit(models[id(data)], loader_of(data, **options)))
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys(), name
        for key, one in tensors.items():
            own = found[name][key]
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(
                    own, one, rtol=1e-7, atol=1e-9, msg=lambda text, at=f"{name} {key}": f"{at}: {text}"
                )
            else:
                assert own == (pytest.approx(one, rel=1e-7) if isinstance(one, float) else one), (name, key)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_fitted_as_a_data_set_of_the_same_rows(workers):
    assert_same(fitted(workers=workers), fitted(stream=False))


def test_sums_need_no_index():
    """Only a random half or a random sample depends on the numbers of the rows."""
    model = modules()[id(CLASSES)]
    for make in (lambda: FitGMM(regularization="oas", feature_transform="raw"), TemperatureScaling, ConformalSets):
        stream = DataLoader(Divided(CLASSES, has_index=False), batch_size=4)
        expected = tensors_of(make().fit(model, DataLoader(CLASSES, batch_size=8)))
        assert_same({"": tensors_of(make().fit(model, stream))}, {"": expected})


def test_an_index_that_is_no_position_is_refused():
    rows = [{"input": x, "target": y, "index": 7} for x, y in CLASSES]
    with pytest.raises(
        InputError, match=r"`index` of a batch must be the positions of its 8 rows in the data, each a different one"
    ):
        FitGMM().fit(modules()[id(CLASSES)], DataLoader(Rows(rows), batch_size=8))


class Rows(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


RANKS = """
import json, warnings
from lightning.pytorch import Trainer
from tests.callbacks.test_streams import *
warnings.simplefilter("ignore")
models, found = modules(), {}
options = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
for name, (callback, data) in fits().items():
    callbacks = [callback]
    trainer = Trainer(devices=2, strategy="ddp", precision="64-true", callbacks=callbacks, **options)
    callback.dataloader = loader_of(data, workers=2, rank=trainer.global_rank, world=2)
    if name == "combined":
        callback.coordinates.held_out.given = loader_of(cases.dataset("classification", 30, 2), workers=2, rank=trainer.global_rank, world=2)
    trainer.validate(models[id(data)], DataLoader(data, batch_size=8), verbose=False)  # fitted at its first batch
    found[name] = callback.state_dict()["tensors"]
    for key, one in tensors_of(callback).items():
        found[name][key] = one.tolist() if isinstance(one, torch.Tensor) else one
if trainer.is_global_zero:
    json.dump(found, open(out, "w"))
"""


def test_two_ranks_with_two_workers_fit_as_one_process(run_script):
    two = run_script(RANKS)
    for name, expected in fitted(stream=False).items():
        for key, one in expected.items():
            if isinstance(one, torch.Tensor):
                two[name][key] = torch.as_tensor(two[name][key], dtype=one.dtype)
        assert_same({name: two[name]}, {name: expected})


# ---------------------------------------------------------------------- constant memory


class Long(IterableDataset):
    """Batches of 100 rows that nobody holds."""

    def __init__(self, num, targets=None):
        self.num, self.targets = num, targets

    def __iter__(self):
        y = torch.arange(100) % cases.CLASSES
        for seed in range(self.num):
            noise = torch.randn(100, cases.FEATURES, generator=torch.Generator().manual_seed(seed))
            x = 2 * torch.eye(cases.CLASSES, cases.FEATURES)[y] + noise
            yield x, y if self.targets is None else x[:, : self.targets]


@pytest.mark.parametrize(
    "make",
    [
        lambda: FitGMM(regularization=1e-3, feature_transform="raw"),
        TemperatureScaling,
        lambda: TemperatureScaling(scope="member", max_rows=100),
        lambda: ConformalSets(max_rows=100),
        lambda: ConformalIntervals(max_rows=100, task=Regression(head="mean")),
    ],
    ids=["gmm", "temperature", "members", "sets", "intervals"],
)
def test_memory_does_not_grow_with_the_stream(make, monkeypatch):
    monkeypatch.setattr(temperature_reader, "_ENOUGH", 1024)  # logits that wait for being added
    is_number = isinstance(make(), ConformalIntervals)
    model = modules()[id(NUMBERS if is_number else CLASSES)].float()

    def fit(num):
        stream = Long(num, cases.TARGETS if is_number else None)
        return lambda: make().fit(model, DataLoader(stream, batch_size=None))

    fit(1)()
    once, four_times = peak_bytes(fit(12)), peak_bytes(fit(48))
    assert four_times <= 1.1 * once


def test_sets_from_a_sample_of_a_long_stream_cover_as_docs_streams_md_says():
    """Scores are uniform in [0, 1], so the threshold is the coverage of later rows: a Beta(n + 1 - l, l) with l = floor((n + 1) alpha)."""
    alpha, n = 0.1, 200
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(400, 2000, generator=generator, dtype=torch.float64)
    sample = RowSample(n)
    for numbers in torch.arange(2000).split(50):
        keys = row_keys(numbers)
        chosen = sample.choose(keys)
        sample.add(keys[chosen], scores.T[numbers][chosen])
    (kept,) = sample.gather(None, "The test")
    assert kept.shape == (n, 400)
    covered = HeldOutScores(kept).threshold(alpha)
    missed = int((n + 1) * alpha)
    deviation = math.sqrt(alpha * (1 - alpha) / (n + 2))
    assert float(covered.mean()) == pytest.approx(1 - missed / (n + 1), abs=4 * deviation / math.sqrt(400))
    assert float(covered.mean()) > 1 - alpha - 4 * deviation / math.sqrt(400)
    assert float(covered.std()) == pytest.approx(deviation, rel=4 / math.sqrt(2 * 400))


def test_an_endless_stream_is_read_up_to_the_trainers_limit(make_trainer):
    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.cycle(iter(CLASSES))

    callbacks = [FitGMM(feature_transform="raw", regularization="oas"), TemperatureScaling()]
    trainer = make_trainer(callbacks=callbacks, limit_train_batches=3, limit_val_batches=2)
    stream = DataLoader(Endless(), batch_size=8)
    module = cases.UsersModule()
    trainer.fit(module, stream, stream)
    rows = list(itertools.islice(stream, 3))
    expected = [
        FitGMM(feature_transform="raw", regularization="oas").fit(module, rows),
        TemperatureScaling().fit(module, rows[:2]),
    ]
    for name, (own, other) in enumerate(zip(callbacks, expected, strict=True)):
        assert_same({name: tensors_of(own)}, {name: tensors_of(other)})
