"""What every metric owes its user: reset, pickle, state_dict, precision, batches, forward, plots, empty data."""

import copy
import importlib.util
import io
import math
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_uq import metrics
from lightning_uq.errors import InputError, MissingExtraError

spec = importlib.util.spec_from_file_location("metric_cases", Path(__file__).with_name("cases.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

ALL = torch.arange(cases.ROWS)
DATA = cases.Data()
COUNTS = ("unpredicted",)  # integers: a set of classes, which is empty without rows
WHOLE = ("unpredicted", "miou")  # whose states are integers
# One for each kind of state: a sum, bins, rows, rows of two kinds, pairs of tensors, blocks that wait for their rest, rows
# with an index. `make test-slow` runs the others.
KINDS = {"nll", "ece", "ece_adaptive", "aurc", "auroc", "gaussian_nll", "joint", "joint_indexed", "unpredicted", "miou"}
each_metric = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in cases.CASES]
)


def value_of(name, rows=ALL, batch=7):
    return cases.feed(cases.make(name), name, DATA, rows, batch).compute().item()


def test_every_metric_is_covered():
    assert {constructor.__name__ for constructor, _, _ in cases.CASES.values()} == set(metrics.__all__)


@each_metric
@pytest.mark.parametrize("batch", [1, 4, 41])
def test_batch_size_is_irrelevant(name, batch):
    assert value_of(name, batch=batch) == pytest.approx(value_of(name), abs=1e-7)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.ORDERED])
def test_order_is_irrelevant(name):
    order = torch.randperm(cases.ROWS, generator=torch.Generator().manual_seed(0))
    assert value_of(name, order) == pytest.approx(value_of(name), abs=1e-7)


@each_metric
def test_reset_forgets_everything(name):
    metric = cases.feed(cases.make(name), name, cases.Data(seed=1), ALL[:20])
    metric.reset()
    assert cases.feed(metric, name, DATA, ALL).compute().item() == value_of(name)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update``")
@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.ORDERED])
@pytest.mark.parametrize("as_state", [False, True])
def test_merging_adds_what_the_other_has_seen(name, as_state):
    parts = [cases.feed(cases.make(name), name, DATA, rows) for rows in (ALL[:20], ALL[20:])]
    parts[0].compute()  # a value from before the merge must not stay
    parts[0].merge_state(parts[1].metric_state if as_state else parts[1])
    assert parts[0].compute().item() == pytest.approx(value_of(name), abs=1e-7)
    nothing = cases.make(name)
    nothing.merge_state(parts[0])
    assert nothing.compute().item() == pytest.approx(value_of(name), abs=1e-7)
    parts[0].merge_state(cases.make(name))
    assert parts[0].compute().item() == pytest.approx(value_of(name), abs=1e-7)


@each_metric
def test_pickle_and_copy_carry_on(name):
    """Copied in the middle of a data set (and of an open block), all go on alike."""
    metric = cases.feed(cases.make(name), name, DATA, ALL[:15])
    for twin in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        assert cases.feed(twin, name, DATA, ALL[15:]).compute().item() == pytest.approx(value_of(name), abs=1e-7)


@each_metric
def test_state_dict_carries_on(name):
    metric = cases.make(name)
    assert metric.state_dict() == {}
    cases.feed(metric, name, DATA, ALL[:15])
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    twin = cases.make(name)
    twin.persistent(True)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert cases.feed(twin, name, DATA, ALL[15:]).compute().item() == pytest.approx(value_of(name), abs=1e-7)


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "to_device_and_dtype": lambda m: m.to("cpu", torch.float16),
    "float": lambda m: m.float(),
}


@each_metric
@pytest.mark.parametrize("conversion", list(CONVERSIONS))
def test_precision_of_the_module_leaves_states_alone(name, conversion):
    """Converted before and in the middle; in bfloat16 a count would stop at 256, a sum much earlier."""
    module = torch.nn.Module()
    module.metric = CONVERSIONS[conversion](cases.make(name))
    cases.feed(module.metric, name, DATA, ALL[:15])
    CONVERSIONS[conversion](module)
    states = list(_tensors(module.metric))
    floating = [s for s in states if s.is_floating_point()]
    assert states
    assert bool(floating) is (name not in WHOLE)
    assert all(s.dtype == torch.float64 for s in floating)
    assert cases.feed(module.metric, name, DATA, ALL[15:]).compute().item() == pytest.approx(value_of(name), abs=1e-7)


def _tensors(metric):
    for state in metric.metric_state.values():
        yield from state if isinstance(state, list) else [state]


def test_set_dtype_converts_on_purpose():
    metric = cases.feed(cases.make("ece_adaptive"), "ece_adaptive", DATA, ALL)
    metric.set_dtype(torch.float32)
    assert {s.dtype for s in metric.confidence} == {torch.float32}
    assert {s.dtype for s in metric.correct} == {torch.uint8}
    assert metric.compute().item() == pytest.approx(value_of("ece_adaptive"), abs=1e-6)


def test_a_device_without_float64_gets_float32_states():
    """MPS refuses float64 with a TypeError; a metric in a module that moves there must not crash it."""

    def move(tensor):
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor

    metric = metrics.ExpectedCalibrationError()
    metric._apply(move)
    assert metric.bins.dtype == torch.float32

    def fail(tensor):
        raise TypeError("another reason")

    with pytest.raises(TypeError, match="another reason"):
        metric._apply(fail)


@each_metric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_precision(name, dtype):
    """Half-precision inputs give the value of those numbers in float32; float64 inputs keep their digits."""
    low, wide = cases.Data(), cases.Data()
    for field in ("logits", "probs", "score", "mean", "variance", "value"):
        rounded = getattr(DATA, field).to(dtype)
        setattr(low, field, rounded)
        setattr(wide, field, rounded.double())
    metric = cases.feed(cases.make(name), name, low, ALL)
    value = metric.compute()
    assert value.dtype == (torch.int64 if name in COUNTS else torch.float64)
    if name.startswith("ece") and dtype != torch.float64:
        # An edge is rounded to the dtype of the confidence: ask the same of the widened one.
        assert value.item() == pytest.approx(value_of(name), abs=0.1)
        return
    if name == "smece" and dtype == torch.bfloat16:
        assert value.item() == pytest.approx(value_of(name), abs=0.02)
    expected = cases.make(name)
    expected.validate_args = False  # rounded probabilities do not sum to one as closely as float64 ones must
    assert value.item() == pytest.approx(cases.feed(expected, name, wide, ALL).compute().item(), abs=1e-5)


def test_float64_keeps_its_digits():
    metric = metrics.NegativeLogLikelihood()
    probs = torch.tensor([[1 - 1e-12, 1e-12]], dtype=torch.float64)
    metric.update(probs, torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(1e-12, rel=1e-3)


@each_metric
def test_forward_gives_the_batch_and_keeps_the_total(name):
    metric = cases.make(name)
    for part in ALL.split(12):
        batch = metric(*cases.CASES[name][2](DATA, part))
        alone = cases.feed(cases.make(name), name, DATA, part, batch=12).compute()
        assert batch.item() == pytest.approx(alone.item(), abs=1e-7, nan_ok=True)
    assert metric.compute().item() == pytest.approx(value_of(name), abs=1e-7)


@each_metric
def test_gradients_reach_the_batch_value_where_promised(name):
    constructor, options, arguments = cases.CASES[name]
    metric = constructor(**options)
    data = cases.Data()
    for field in ("logits", "probs", "score", "mean", "variance", "label_logits"):
        setattr(data, field, getattr(data, field).clone().requires_grad_())
    value = metric(*arguments(data, ALL[6:18]))  # not row 5: the entropy has an infinite slope at p = 0
    if metric.is_differentiable:
        value.backward()
        gradients = [getattr(data, f).grad for f in ("logits", "probs", "mean", "label_logits")]
        assert any(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)
    assert all(not state.requires_grad for state in _tensors(metric))
    metric.update(*arguments(data, ALL[18:]))
    assert not metric.compute().requires_grad


@each_metric
def test_without_rows_the_value_is_nan_and_a_count_0(name):
    """As at a sanity check of zero batches: a warning, never a crash; the same after an empty batch."""
    metric = cases.make(name)
    empty = 0 if name in COUNTS else math.nan
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        assert metric.compute().item() == pytest.approx(empty, nan_ok=True)
    messages = [str(warning.message) for warning in record]
    assert any("was called before the ``update``" in message for message in messages)
    if name.startswith(("joint", "au", "fpr")) and name not in ("aurc", "augrc", "ause", "ause_mae"):
        assert sum("its value is NaN" in message for message in messages) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.update(*cases.CASES[name][2](DATA, ALL[:0]))
        assert metric.compute().item() == pytest.approx(empty, nan_ok=True)
    assert cases.feed(metric, name, DATA, ALL).compute().item() == pytest.approx(value_of(name), abs=1e-12)


@each_metric
def test_inference_mode(name):
    """Lightning validates in inference mode and may reset or go on outside of it."""
    metric = cases.make(name)
    with torch.inference_mode():
        cases.feed(metric, name, DATA, ALL[:15])
    cases.feed(metric, name, DATA, ALL[15:])
    assert metric.compute().item() == pytest.approx(value_of(name), abs=1e-7)
    with torch.inference_mode():
        metric.reset()
    assert cases.feed(metric, name, DATA, ALL).compute().item() == value_of(name)


@each_metric
def test_declared_properties(name):
    metric = cases.make(name)
    assert metric.higher_is_better in (True, False, None)
    assert metric.is_differentiable in (True, False)
    assert metric.full_state_update is (name.startswith("joint"))
    if metric.plot_lower_bound is not None:
        assert metric.plot_lower_bound <= value_of(name)
    if metric.plot_upper_bound is not None:
        assert value_of(name) <= metric.plot_upper_bound


@each_metric
def test_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        assert value_of(name) == value_of(name)
    finally:
        torch.use_deterministic_algorithms(False)


@each_metric
def test_validation_can_be_switched_off(name):
    constructor, options, _ = cases.CASES[name]
    metric = constructor(**options, validate_args=False)
    assert cases.feed(metric, name, DATA, ALL).compute().item() == value_of(name)
    with pytest.raises(InputError, match="`validate_args` must be True or False, but it is 1"):
        constructor(**options, validate_args=1)


@each_metric
def test_plot(name, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = cases.feed(cases.make(name), name, DATA, ALL)
    try:
        figure, axis = metric.plot()
        figure.savefig(tmp_path / "figure.png")
        assert axis.has_data()
        if metric._draw.__func__ is not metrics.base.UncertaintyMetric._draw:
            assert f"{value_of(name):.4f}" in axis.get_title()
            assert axis.get_xlabel()
        _, given = pyplot.subplots()
        assert metric.plot(ax=given)[1] is given
        assert metric.plot([metric.compute(), metric.compute()])[1].has_data()
    finally:
        pyplot.close("all")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    metric = cases.feed(cases.make("ece"), "ece", DATA, ALL)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-uq\[report\]'"):
        metric.plot()


def test_a_collection_shares_no_state_by_chance():
    """torchmetrics lets metrics share a state that is equal after one batch. Here the first batch makes several equal."""
    collection = MetricCollection(
        {
            "nll": metrics.NegativeLogLikelihood(),
            "brier": metrics.BrierScore(),
            "entropy": metrics.PredictiveEntropy(),
            "ece": metrics.ExpectedCalibrationError(),
            "aurc": metrics.AURC(),
            "augrc": metrics.AUGRC(),
        }
    )
    perfect = torch.eye(3)
    collection.update(perfect, torch.arange(3))  # every sum is 0
    collection.update(DATA.probs, DATA.target)
    for name, value in collection.compute().items():
        alone = cases.make(name)
        alone.update(perfect, torch.arange(3))
        alone.update(DATA.probs, DATA.target)
        assert value.item() == pytest.approx(alone.compute().item(), abs=1e-12)
    assert ["aurc", "augrc"] in [sorted(g, reverse=True) for g in collection.compute_groups.values()]

    levels = {f"level{int(100 * level)}": metrics.IntervalCoverage(level) for level in (0.5, 0.9)}
    kinds = {"a": metrics.RegressionNLL(), "b": metrics.RegressionNLL(moment_matched=True), "c": metrics.CRPS()}
    collection = MetricCollection(levels | kinds)
    center = (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)), torch.zeros(1, 1)
    collection.update(*center)  # one member at its own mean: all levels cover it, both densities agree
    collection.update(*cases.regress(DATA, ALL))
    found = collection.compute()
    assert found["level50"] < found["level90"]
    assert found["a"] != found["b"]
    joints = MetricCollection({f"t{t}": metrics.JointLogLoss(t) for t in (1, 2)})
    joints.update(torch.tensor([[[0.0, -200.0]] * 2]), torch.tensor([0, 0]))  # a loss of 0 for both
    joints.update(DATA.logits[:1], DATA.target)
    found = joints.compute()
    assert found["t2"].item() == pytest.approx(2 * found["t1"].item())
