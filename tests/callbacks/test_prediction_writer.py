"""PredictionWriter: what stands in the files, which rows, when they appear, and what is refused."""

import csv
import gc
import signal
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from lightning_uq import (
    CategoricalPrediction,
    DeterministicModule,
    EnsembleModule,
    EvidentialModule,
    EvidentialRegressionModule,
    FitGMM,
    Indexed,
    InputError,
    MissingExtraError,
    PredictionWriter,
    TemperatureScaling,
    UnsupportedError,
    read_predictions,
)
from lightning_uq.callbacks import prediction_files
from lightning_uq.cli import main

N = 11
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(N) % 3
DATA = TensorDataset(X, Y)
LOADER = DataLoader(DATA, batch_size=4)


@pytest.fixture(params=["parquet", "csv"])
def format(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


def classifier() -> DeterministicModule:
    return DeterministicModule(nn.Linear(4, 3))


def write(make_trainer, model, loader, directory, *callbacks, trainer=None, **kwargs):
    """Predict with a writer; gives the writer and the predictions."""
    writer = PredictionWriter(directory, **kwargs)
    predictions = make_trainer(callbacks=[*callbacks, writer], **(trainer or {})).predict(model, loader)
    return writer, predictions


def names(directory: Path) -> list[str]:
    """All files of a directory, hidden ones too."""
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------- columns


def assert_holds(table, predictions) -> None:
    """Each number of each batch's ``to_dict`` is in the table, to the last bit, and nothing else but index and interval."""
    batches = [prediction.to_dict() for prediction in predictions]
    expected = {}
    for name in batches[0]:
        values = torch.cat([batch[name] for batch in batches])
        name = {"probs": "prob"}.get(name, name)
        columns = {name: values} if values.ndim == 1 else {f"{name}_{i}": v for i, v in enumerate(values.T)}
        expected.update(columns)
    assert [name for name in table if not name.startswith(("lower", "upper", "index"))] == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(table[name].astype(values.numpy().dtype), values.numpy(), err_msg=name)
    assert table["index"].tolist() == list(range(sum(len(prediction) for prediction in predictions)))


@pytest.mark.parametrize("kind", ["categorical", "dirichlet", "gaussian", "student_t"])
def test_the_columns_are_those_of_to_dict_and_the_interval(make_trainer, tmp_path, format, kind):
    model = {
        "categorical": classifier,
        "dirichlet": lambda: EvidentialModule(nn.Linear(4, 3)),
        "gaussian": lambda: DeterministicModule(nn.Linear(4, 4), task="regression"),
        "student_t": lambda: EvidentialRegressionModule(nn.Linear(4, 8)),
    }[kind]()
    writer, predictions = write(make_trainer, model, LOADER, tmp_path, format=format)
    table = read_predictions(tmp_path)
    assert_holds(table, predictions)
    assert table["index"].dtype == np.int64
    assert writer.written == {tmp_path / f"predictions-rank0.{format}": N}
    assert names(tmp_path) == [f"predictions-rank0.{format}"]
    if kind in ("gaussian", "student_t"):
        lower, upper = (torch.cat(bounds) for bounds in zip(*(p.interval(0.95) for p in predictions), strict=True))
        for name, values in (("lower", lower), ("upper", upper)):
            written = np.stack([table[f"{name}_0"], table[f"{name}_1"]], 1)
            np.testing.assert_array_equal(written.astype(values.numpy().dtype), values.numpy())
    else:
        assert table["label"].dtype == np.int64
        assert not {"lower_0", "upper_0"} & set(table)


def test_probs_and_interval_are_options(make_trainer, tmp_path):
    write(make_trainer, classifier(), LOADER, tmp_path / "a", format="csv", probs=False)
    assert not [name for name in read_predictions(tmp_path / "a") if name.startswith("prob")]
    model = DeterministicModule(nn.Linear(4, 2), task="regression")
    write(make_trainer, model, LOADER, tmp_path / "b", format="csv", interval=0.5)
    table = read_predictions(tmp_path / "b")
    quartile = 0.6744897501960817 * np.sqrt(table["variance_0"])
    np.testing.assert_allclose(table["upper_0"] - table["mean_0"], quartile, rtol=1e-5)
    np.testing.assert_allclose(table["mean_0"] - table["lower_0"], quartile, rtol=1e-5)
    write(make_trainer, model, LOADER, tmp_path / "c", format="csv", interval=None)
    assert not {"lower_0", "upper_0"} & set(read_predictions(tmp_path / "c"))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_every_precision_is_written(make_trainer, tmp_path, format, precision):
    _, predictions = write(
        make_trainer, classifier(), LOADER, tmp_path, format=format, trainer={"precision": precision}
    )
    table = read_predictions(tmp_path)
    label = CategoricalPrediction.cat(predictions).label
    assert table["label"].tolist() == label.tolist()
    total = sum(table[f"prob_{c}"] for c in range(3))
    np.testing.assert_allclose(total, 1, atol=1e-12 if precision == "64-true" else 1e-2)


def test_of_many_indices_the_interval_is_left_out_with_a_warning(make_trainer, tmp_path):
    members = {"num_members": 33, "task": "regression", "execution": "loop"}
    model = EnsembleModule(lambda: nn.Linear(4, 2), **members)
    with pytest.warns(UserWarning, match="leaves out `lower` and `upper`. The bounds .*return_members = True"):
        write(make_trainer, model, LOADER, tmp_path / "pooled", format="csv")
    pooled = read_predictions(tmp_path / "pooled")
    model.return_members = True
    write(make_trainer, model, LOADER, tmp_path / "whole", format="csv")
    whole = read_predictions(tmp_path / "whole")
    assert [name for name in whole if name not in pooled] == ["lower_0", "upper_0"]
    for name, values in pooled.items():
        np.testing.assert_allclose(values, whole[name])
    write(
        make_trainer,
        EnsembleModule(lambda: nn.Linear(4, 2), **members),
        LOADER,
        tmp_path / "none",
        format="csv",
        interval=None,
    )
    assert list(read_predictions(tmp_path / "none")) == list(pooled)


def test_not_a_number_survives(make_trainer, tmp_path, format):
    class Odd(DeterministicModule):
        def predict_step(self, batch, batch_idx=0):
            logits = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, 0.0]])
            return CategoricalPrediction(torch.zeros(1, 3, 2), log_density=logits[:, 0])

    loader = DataLoader(X[:3], batch_size=3)
    write(make_trainer, Odd(nn.Linear(4, 2)), loader, tmp_path, format=format)
    np.testing.assert_array_equal(read_predictions(tmp_path)["log_density"], [np.nan, np.inf, -np.inf])


class UsersModule(LightningModule):
    """As somebody writes it who has never heard of uncertainty."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The likelihood has no finite positive temperature")
def test_an_unmodified_module_is_written_with_what_was_fitted(make_trainer, tmp_path, format):
    module = UsersModule()
    temperature = TemperatureScaling(attach=True, weights="last")
    gmm = FitGMM(feature_transform="raw", attach=True, weights="last", covariance="tied", regularization=1e-2)
    writer = PredictionWriter(tmp_path, format)
    trainer = make_trainer(callbacks=[writer, temperature, gmm])  # the writer may stand first
    trainer.fit(module, LOADER, LOADER)
    assert names(tmp_path) == []
    predictions = trainer.predict(module, LOADER)
    table = read_predictions(tmp_path)
    assert_holds(table, predictions)
    probs = torch.softmax(module(X) / temperature.temperature.float(), 1).detach()
    np.testing.assert_allclose(table["prob_0"], probs[:, 0], rtol=1e-5)
    np.testing.assert_allclose(table["log_density"], -gmm.score(module, LOADER).numpy(), rtol=1e-4)


# ---------------------------------------------------------------------- rows


@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling enabled")
def test_index_is_the_position_in_the_data_set(make_trainer, tmp_path):
    class Echo(DeterministicModule):
        """The label of a row is its first feature."""

        def predict_step(self, batch, batch_idx=0):
            x, _ = self.unpack_batch(batch)
            return CategoricalPrediction(100 * nn.functional.one_hot(x.reshape(-1).long(), 20).float().unsqueeze(0))

    model = Echo(nn.Linear(1, 20))
    x = torch.arange(N).float().unsqueeze(1)
    subset = [7, 2, 9]
    cases = {
        "sequential": (DataLoader(TensorDataset(x, Y), batch_size=3), range(N)),
        "shuffled": (DataLoader(x, batch_size=3, shuffle=True), range(N)),
        "subset": (DataLoader(x, batch_size=2, sampler=SubsetRandomSampler(subset)), sorted(subset)),
        # Indexed stands inside, and knows better than the sampler.
        "indexed": (
            DataLoader(torch.utils.data.Subset(Indexed(TensorDataset(x, Y)), subset), batch_size=2),
            sorted(subset),
        ),
        "mapping": (DataLoader([{"input": x[i], "index": i} for i in subset], batch_size=2), sorted(subset)),
        "drop_last": (DataLoader(x, batch_size=3, drop_last=True), range(N)),
        "batches": (DataLoader(x.split(4), batch_size=None), range(N)),
        "workers": (DataLoader(x, batch_size=1, num_workers=2), range(N)),
    }
    for name, (loader, expected) in cases.items():
        write(make_trainer, model, loader, tmp_path / name, format="csv")
        table = read_predictions(tmp_path / name)
        assert table["index"].tolist() == list(expected), name
        assert table["label"].tolist() == list(expected), name


class Stream(IterableDataset):
    def __iter__(self):
        yield from X


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_a_stream_counts_its_rows(make_trainer, tmp_path):
    write(make_trainer, classifier(), DataLoader(Stream(), batch_size=4), tmp_path, format="csv")
    assert read_predictions(tmp_path)["index"].tolist() == list(range(N))


def test_each_loader_has_its_file(make_trainer, tmp_path, format):
    model = classifier()
    loaders = {"a": LOADER, "b": DataLoader(X[:3], batch_size=2), "c": DataLoader(Stream(), batch_size=4)}
    writer, predictions = write(make_trainer, model, loaders, tmp_path, format=format)
    assert names(tmp_path) == [f"predictions-loader{i}-rank0.{format}" for i in range(3)]
    assert list(writer.written.values()) == [N, 3, N]
    for i, own in enumerate(predictions):
        assert_holds(read_predictions(tmp_path, i), own)
    with pytest.raises(InputError, match=r"must hold predictions of loader 3, but .* holds none\."):
        read_predictions(tmp_path, 3)


def test_limited_batches_are_what_is_written(make_trainer, tmp_path):
    write(make_trainer, classifier(), LOADER, tmp_path, format="csv", trainer={"limit_predict_batches": 2})
    assert read_predictions(tmp_path)["index"].tolist() == list(range(8))


def test_blocks_are_flushed_and_predictions_are_let_go(make_trainer, tmp_path, format, monkeypatch):
    """Memory: no earlier prediction is alive, no earlier block is kept, and the rows are on their way to the disk."""
    alive: list[weakref.ref] = []
    kept: list[int] = []

    class Watch(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            alive.append(weakref.ref(outputs))
            kept.append(sum(len(block["index"]) for file in writer._files.values() for block in file._blocks))

    block_bytes = 4 * (8 + 8 + 4 * (4 + 3))  # rows of index, label, four scores and three probabilities
    monkeypatch.setattr(prediction_files, "FLUSH_BYTES", 3 * block_bytes)
    writer = PredictionWriter(tmp_path, format)
    trainer = make_trainer(callbacks=[writer, Watch()])
    loader = DataLoader(torch.randn(80, 4), batch_size=4)
    assert trainer.predict(classifier(), loader, return_predictions=False) is None
    gc.collect()
    assert len(alive) == 20
    assert all(ref() is None for ref in alive)
    assert kept == [4, 8, 0] * 6 + [4, 8]
    assert read_predictions(tmp_path)["index"].tolist() == list(range(80))
    if format == "parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.ParquetFile(tmp_path / "predictions-rank0.parquet").num_row_groups == 7


# ---------------------------------------------------------------------- whole or not at all


@pytest.fixture
def keep_signals():
    """After an interrupt Lightning leaves the process deaf to the next."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Failing(DeterministicModule):
    """Fails at the third batch."""

    error: BaseException = RuntimeError("a bug of my own")

    def predict_step(self, batch, batch_idx=0):
        if batch_idx == 2:
            assert names(self.directory) == self.expected
            raise self.error
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("error", [RuntimeError("a bug of my own"), KeyboardInterrupt()])
def test_an_exception_leaves_nothing_and_an_earlier_result_as_it_was(
    make_trainer, tmp_path, format, error, keep_signals
):
    ended = SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError  # Lightning exits on an interrupt
    model = Failing(nn.Linear(4, 3))
    model.error, model.directory = error, tmp_path
    model.expected = [f".predictions-rank0.{format}.partial"]
    with pytest.raises(ended):
        write(make_trainer, model, LOADER, tmp_path, format=format)
    assert names(tmp_path) == []
    write(make_trainer, classifier(), LOADER, tmp_path, format=format)
    before = (tmp_path / f"predictions-rank0.{format}").read_bytes()
    model.expected += [f"predictions-rank0.{format}"]
    with pytest.raises(ended):
        write(make_trainer, model, LOADER, tmp_path, format=format, overwrite=True)
    assert names(tmp_path) == [f"predictions-rank0.{format}"]
    assert (tmp_path / f"predictions-rank0.{format}").read_bytes() == before


def test_a_writer_predicts_again_after_a_failure(make_trainer, tmp_path, format):
    model = Failing(nn.Linear(4, 3))
    model.directory, model.expected = tmp_path, [f".predictions-rank0.{format}.partial"]
    writer = PredictionWriter(tmp_path, format, overwrite=True)
    trainer = make_trainer(callbacks=[writer])
    with pytest.raises(RuntimeError, match="a bug of my own"):
        trainer.predict(model, LOADER)
    assert writer.written == {}
    for _ in range(2):
        trainer.predict(classifier(), LOADER)
        assert list(writer.written.values()) == [N]
        assert read_predictions(tmp_path)["index"].tolist() == list(range(N))


def test_existing_files_are_an_error_before_the_first_batch(make_trainer, tmp_path, format):
    model = Failing(nn.Linear(4, 3))
    (tmp_path / f"predictions-rank3.{format}").write_text("old")
    with pytest.raises(InputError, match=rf"already holds predictions: .*predictions-rank3\.{format}\. Pass"):
        write(make_trainer, model, LOADER, tmp_path, format=format)
    assert names(tmp_path) == [f"predictions-rank3.{format}"]


def test_overwrite_removes_what_an_earlier_run_left(make_trainer, tmp_path, format):
    mine = [f"predictions.{format}", f"predictions-rank0.{format}.bak", f"predictions-mine-rank0.{format}", "notes"]
    for name in (
        *mine,
        *(f"predictions{x}.{format}" for x in ("-rank0", "-rank1", "-loader1-rank0", "-loader0-rank2")),
    ):
        (tmp_path / name).write_text("old")
    write(make_trainer, classifier(), LOADER, tmp_path, format=format, overwrite=True)
    assert names(tmp_path) == sorted([*mine, f"predictions-rank0.{format}"])
    assert len(read_predictions(tmp_path)["index"]) == N


def test_both_formats_live_side_by_side(make_trainer, tmp_path):
    pytest.importorskip("pyarrow")
    writers = [PredictionWriter(tmp_path, format, overwrite=True) for format in ("parquet", "csv")]
    make_trainer(callbacks=writers).predict(classifier(), LOADER)
    assert names(tmp_path) == ["predictions-rank0.csv", "predictions-rank0.parquet"]
    with pytest.raises(InputError, match="holds them in the formats csv and parquet: pass `format`"):
        read_predictions(tmp_path)
    one, other = (read_predictions(tmp_path, format=format) for format in ("parquet", "csv"))
    assert list(one) == list(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name].astype(values.dtype))


def test_fit_and_test_write_nothing(make_trainer, tmp_path):
    writer = PredictionWriter(tmp_path / "there", "csv")
    trainer = make_trainer(callbacks=[writer])
    trainer.fit(classifier(), LOADER, LOADER)
    trainer.test(classifier(), LOADER)
    assert not (tmp_path / "there").exists()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "json"}, "`format` must be 'parquet', 'csv' or 'npz', but it is 'json'"),
        ({"interval": 1.0}, r"`interval` must be in \(0, 1\) or None, but it is 1.0"),
        ({"interval": 0}, "but it is 0"),
    ],
)
def test_arguments(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        PredictionWriter(tmp_path, **arguments)


@pytest.mark.parametrize("missing", ["pyarrow", "pyarrow.parquet"])
def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"need pyarrow: pip install 'lightning-uq\[parquet\]'"):
        PredictionWriter(tmp_path)
    PredictionWriter(tmp_path, "csv")


@pytest.mark.parametrize(
    ("value", "came"),
    [(torch.zeros(4, 3), "a Tensor"), (None, "NoneType"), ([CategoricalPrediction(torch.zeros(1, 4, 3))], "a list")],
)
@pytest.mark.filterwarnings("ignore:predict returned None")
def test_what_is_no_prediction(make_trainer, tmp_path, value, came):
    class Mine(UsersModule):
        def predict_step(self, batch, batch_idx):
            return value

    with pytest.raises(
        InputError,
        match=rf"`predict_step` of Mine returned {came}\. Use .* `attach=True` to a callback, such as `FitGMM\(attach=T",
    ):
        write(make_trainer, Mine(), LOADER, tmp_path, format="csv")
    assert names(tmp_path) == []


@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (1, 4, 3, 5, 5)])
def test_maps(make_trainer, tmp_path, shape):
    class Maps(DeterministicModule):
        def predict_step(self, batch, batch_idx=0):
            return CategoricalPrediction(torch.zeros(shape))

    labels = [4, *shape[3:]]
    with pytest.raises(InputError) as error:
        write(make_trainer, Maps(nn.Linear(4, 3)), LOADER, tmp_path, format="csv", probs=False)
    assert f"`label` of the CategoricalPrediction has shape {labels}. Pass `format='npz'`" in str(error.value)
    assert names(tmp_path) == []


# ---------------------------------------------------------------------- arrays


class Shapes(torch.utils.data.Dataset):
    """Maps of 6 x 5 pixels."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(i))


def segmenter(**kwargs):
    return EnsembleModule(lambda: nn.Conv2d(1, 3, 1), num_members=2, task="segmentation", seed=0, **kwargs)


@pytest.mark.parametrize("flush", [1, 2**24])
def test_maps_are_written_as_arrays_and_come_back_in_order(make_trainer, tmp_path, monkeypatch, flush):
    monkeypatch.setattr(prediction_files, "FLUSH_BYTES", flush)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    model = segmenter()
    loader = DataLoader(torch.utils.data.Subset(Shapes(), range(N)), batch_size=4, sampler=order)
    writer, predictions = write(make_trainer, model, loader, tmp_path, format="npz")
    assert writer.written == {tmp_path / "predictions-rank0.npz": N}
    arrays = read_predictions(tmp_path)
    expected = CategoricalPrediction.cat(predictions)[torch.tensor(order).argsort()].to_dict()
    assert list(arrays) == ["index", *expected]
    assert arrays["index"].tolist() == list(range(N))
    for name, values in expected.items():
        assert arrays[name].dtype == values.numpy().dtype
        np.testing.assert_array_equal(arrays[name], values.numpy(), err_msg=name)
    with np.load(tmp_path / "predictions-rank0.npz") as archive:
        assert len([name for name in archive.files if name.startswith("label/")]) == (4 if flush == 1 else 2)
    some = read_predictions(tmp_path, names=["label"])
    assert list(some) == ["label"]
    np.testing.assert_array_equal(some["label"], arrays["label"])
    with pytest.raises(
        InputError, match=r"`names` must be columns of the files in .*, but they have no column 'labels'"
    ):
        read_predictions(tmp_path, names=["labels"])


def test_a_file_of_arrays_holds_rows_of_a_table_too(make_trainer, tmp_path, format):
    write(make_trainer, classifier(), LOADER, tmp_path / "table", format=format)
    write(make_trainer, classifier(), LOADER, tmp_path / "arrays", format="npz")
    torch.manual_seed(0)
    model = classifier()
    for kind in (format, "npz"):
        write(make_trainer, model, LOADER, tmp_path / kind, format=kind)
    table, arrays = read_predictions(tmp_path / format), read_predictions(tmp_path / "npz")
    assert arrays["probs"].shape == (N, 3)
    np.testing.assert_array_equal(np.stack([table[f"prob_{i}"] for i in range(3)], 1).astype("f4"), arrays["probs"])
    np.testing.assert_array_equal(table["label"], arrays["label"])
    assert list(read_predictions(tmp_path / format, names=["prob_1", "label"])) == ["prob_1", "label"]


def test_maps_of_two_sizes_are_named(make_trainer, tmp_path):
    batches = [torch.zeros(2, 1, 6, 5), torch.zeros(2, 1, 4, 5)]
    with pytest.raises(
        InputError, match=r"confidence, .* differ .* \(the shape of an input's confidence \[4, 5\], before \[6, 5\]\)"
    ):
        write(make_trainer, segmenter(), DataLoader(batches, batch_size=None), tmp_path, format="npz")
    assert names(tmp_path) == []


def test_writing_maps_takes_no_more_memory_for_more_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_files, "FLUSH_BYTES", 2**16)
    maps = np.zeros((2, 64, 64), np.float32)  # 32 kB
    file = prediction_files.NpzFile(tmp_path / "predictions-rank0.npz", {"index": np.arange(2), "score": maps})
    for _ in range(50):
        file.add({"index": np.arange(2), "score": maps})
        assert sum(block["score"].nbytes for block in file._blocks) <= 2**16
    file.close()
    assert file.rows == 100


def test_columns_that_change(make_trainer, tmp_path, format):
    class Fickle(DeterministicModule):
        def predict_step(self, batch, batch_idx=0):
            prediction = super().predict_step(batch, batch_idx)
            return prediction.replace(log_density=torch.zeros(len(prediction))) if batch_idx else prediction

    with pytest.raises(InputError, match=r"the same columns, but log_density, ood_score differ from the first batch's"):
        write(make_trainer, Fickle(nn.Linear(4, 3)), LOADER, tmp_path, format=format)
    assert names(tmp_path) == []


def test_rows_without_a_known_index(make_trainer, tmp_path):
    loader = DataLoader(DATA, batch_size=4, collate_fn=lambda items: torch.stack([x for x, _ in items[1:]]))
    with pytest.raises(
        InputError, match="Each of the 3 predictions of batch 0 must have an index, but the sampler yielded 4. Add a"
    ):
        write(make_trainer, classifier(), loader, tmp_path, format="csv")
    loader = DataLoader(
        DATA, batch_size=4, collate_fn=lambda b: {"input": torch.stack([x for x, _ in b]), "index": torch.tensor(1)}
    )
    with pytest.raises(
        InputError, match=r"4 predictions of batch 0 must have an index, but `index` of the batch has shape \[\]"
    ):
        write(make_trainer, classifier(), loader, tmp_path, format="csv")
    assert names(tmp_path) == []
    # With an index of its own a batch may hold other rows than its sampler named.
    loader = DataLoader(
        DATA,
        batch_size=4,
        collate_fn=lambda b: {"input": torch.stack([x for x, _ in b[1:]]), "index": torch.arange(len(b) - 1)},
    )
    write(make_trainer, classifier(), loader, tmp_path, format="csv")
    assert read_predictions(tmp_path)["index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_directory_that_cannot_be(make_trainer, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"`output_dir` must be a directory, but .* cannot be one: "):
            write(make_trainer, classifier(), LOADER, path, format="csv")


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_takes_the_iterator(make_trainer, tmp_path):
    class Iterating(DeterministicModule):
        def predict_step(self, dataloader_iter):
            return super().predict_step(next(dataloader_iter)[0])

    with pytest.raises(UnsupportedError, match=r"`predict_step\(dataloader_iter\)`"):
        write(make_trainer, Iterating(nn.Linear(4, 3)), LOADER, tmp_path, format="csv")


def test_reading_refuses_other_tables(tmp_path):
    (tmp_path / "predictions-rank0.csv").write_text("index,label\n1,2\n")
    (tmp_path / "predictions-rank1.csv").write_text("index,label\n")
    table = read_predictions(tmp_path)
    assert {name: values.tolist() for name, values in table.items()} == {"index": [1], "label": [2]}
    (tmp_path / "predictions-rank1.csv").write_text("index,mean_0\n0,2\n")
    with pytest.raises(InputError, match="have different columns"):
        read_predictions(tmp_path)
    with pytest.raises(InputError, match="holds none"):
        read_predictions(tmp_path / "nowhere")


# ---------------------------------------------------------------------- the command line


def test_it_is_built_from_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    writer = {"output_dir": "there", "format": "csv", "probs": False, "interval": None, "overwrite": False}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_uq.DeterministicModule",
            "init_args": {
                "network": {
                    "class_path": "lightning_uq.Factory",
                    "init_args": {"target": "torch.nn.Linear", "kwargs": {"in_features": 64, "out_features": 10}},
                },
            },
        },
        "data": {"class_path": "lightning_uq.data.DigitsDataModule"},
        "trainer": {
            "accelerator": "cpu",
            "limit_predict_batches": 2,
            "callbacks": [{"class_path": "lightning_uq.PredictionWriter", "init_args": writer}],
            **off,
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert main(["predict", "--config", "config.yaml", "--untrained"]) == 0
    assert names(Path("there")) == ["predictions-rank0.csv"]
    assert not list(Path().glob("*.csv"))  # the command's own file is for those who asked for no other
    with Path("there/predictions-rank0.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[:3] == ["index", "label", "confidence"]
    assert rows
    assert main(["predict", "--config", "config.yaml", "--untrained"]) == 2
    assert "predictions-rank0.csv. Pass `overwrite=True`" in capsys.readouterr().err


# ---------------------------------------------------------------------- two processes

CODE = """
import json, os, torch
from pathlib import Path
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from lightning_uq import DeterministicModule, Indexed, InputError, PredictionWriter, read_predictions

RANK = int(os.environ.get("LOCAL_RANK", 0))
N = 7
generator = torch.Generator().manual_seed(1)
X, Y = torch.randn(N, 4, generator=generator), torch.arange(N)
network = nn.Linear(4, 3)
with torch.no_grad():
    network.weight.copy_(torch.randn(3, 4, generator=generator))
    network.bias.zero_()


class Mine(IterableDataset):
    def __iter__(self):
        yield from ({"input": X[i], "index": i} for i in range(RANK, N, 2))


def run(name, loader, format, devices=2, **kwargs):
    directory = Path(out).parent / name
    writer = PredictionWriter(directory, format, overwrite=True)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False, callbacks=[writer],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        precision="64-true", **kwargs,  # batches of two ranks and of one are compared
    )
    try:
        trainer.predict(DeterministicModule(network), loader, return_predictions=False)
    except InputError as error:
        return str(error)
    trainer.strategy.barrier()
    return {
        "files": sorted(path.name for path in directory.iterdir()),
        "rows": {path.name: rows for path, rows in writer.written.items()},
        "table": {k: v.tolist() for k, v in read_predictions(directory).items()},
    }


data = TensorDataset(X, Y)
padded = DistributedSampler(data, 2, RANK, shuffle=False)
mixed = DistributedSampler(data, 2, RANK, shuffle=True)
results = {}
if os.environ.get("WORLD_SIZE", "1") == "1" and RANK == 0:
    for format in ("parquet", "csv"):
        results[format, "one"] = run("one-" + format, DataLoader(data, 2), format, devices=1)
for format in ("parquet", "csv"):
    directory = Path(out).parent / ("two-" + format)
    if RANK == 0:  # of an earlier run on three ranks
        directory.mkdir()
        (directory / f"predictions-rank2.{format}").write_text("old")
    results[format, "two"] = run("two-" + format, DataLoader(data, 2), format)
    results[format, "padded"] = run("padded-" + format, DataLoader(data, 2, sampler=padded), format)
results["csv", "mixed"] = run("mixed", DataLoader(Indexed(data), 2, sampler=mixed), "csv")
results["csv", "stream"] = run("stream", DataLoader(Mine(), 2), "csv")
results["csv", "one row"] = run("one-row", DataLoader(data, 1, sampler=padded), "csv", limit_predict_batches=4)
refused = {
    "shuffled": run("a", DataLoader(data, 2, shuffle=True), "csv"),
    "unshared": run("b", DataLoader(data, 2), "csv", use_distributed_sampler=False),
    "stream": run("c", DataLoader(X.split(2), batch_size=None, sampler=None), "csv"),
}
if RANK == 0:
    json.dump({"results": [[*k, v] for k, v in results.items()], "refused": refused}, open(out, "w"))
"""


def test_two_processes_write_each_sample_once(run_script):
    pytest.importorskip("pyarrow")
    found = run_script(CODE)
    results = {(format, name): result for format, name, result in found["results"]}
    for format in ("parquet", "csv"):
        one = results[format, "one"]
        assert one["table"]["index"] == list(range(7))
        for name in ("two", "padded", *(("mixed", "stream") if format == "csv" else ())):
            result = results[format, name]
            assert result["files"] == [f"predictions-rank{r}.{format}" for r in range(2)], (format, name)
            table = result["table"]
            assert list(table) == list(one["table"])
            for column, values in one["table"].items():
                assert table[column] == pytest.approx(values, rel=1e-9), (format, name, column)
        assert results[format, "two"]["rows"] == {f"predictions-rank0.{format}": 4}
    assert results["csv", "one row"]["table"]["index"] == list(range(7))  # rank 1's last batch is padding alone
    assert "must not shuffle, but it has a RandomSampler" in found["refused"]["shuffled"]
    assert "has no distributed sampler, so every rank would predict all samples" in found["refused"]["unshared"]
    assert "Make each batch a mapping with a key `index`" in found["refused"]["stream"]


SPAWNED = """
import json, torch
from pathlib import Path
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from tests.leaving import LeaveAtOnce
from lightning_uq import DeterministicModule, PredictionWriter, read_predictions


class Failing(DeterministicModule):
    def predict_step(self, batch, batch_idx=0):
        if batch_idx == 1 and self.global_rank == 1:
            raise RuntimeError("on one rank")
        return super().predict_step(batch, batch_idx)


def run(kind):
    writer = PredictionWriter(Path(out).parent / "there", "csv")
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, callbacks=[writer, LeaveAtOnce()],
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    loader = DataLoader(torch.zeros(7, 4), 1)
    trainer.predict(kind(nn.Linear(4, 3)), loader, return_predictions=False)


if __name__ == "__main__":
    try:
        run(Failing)
    except Exception as error:
        text = str(error)
    left = [path.name for path in (Path(out).parent / "there").iterdir()]
    run(DeterministicModule)
    index = read_predictions(Path(out).parent / "there")["index"].tolist()
    json.dump({"error": text, "left": left, "index": index}, open(out, "w"))
"""


@pytest.mark.slow
def test_spawned_processes(run_script):
    found = run_script(SPAWNED)
    assert "on one rank" in found["error"]
    assert found["left"] == []
    assert found["index"] == list(range(7))


def test_what_spawned_ranks_left_is_removed(make_trainer, tmp_path):
    trainer = make_trainer(strategy="ddp_spawn", devices=2)
    trainer.state.fn = "predict"
    (tmp_path / ".predictions-rank1.csv.partial").touch()
    (tmp_path / "predictions-rank0.csv").touch()
    PredictionWriter(tmp_path, "csv").on_exception(trainer, None, RuntimeError())
    assert names(tmp_path) == ["predictions-rank0.csv"]
