"""Fitted calibrations as modules: their exported graphs say what they say, also of classes that are all but ruled out."""

import math

import pytest
import torch

from lightning_uq.functional.isotonic import fit_isotonic
from lightning_uq.functional.matrix_scaling import fit_matrix_scaling
from lightning_uq.networks.class_calibration import ClassCalibration

ROWS = torch.tensor([[1.0, 0.5, 0.0], [0.0, -150.0, 300.0], [0.0, -math.inf, 1.0], [0.0, 0.0, -2e4]]).log_softmax(1)


def fitted(name, confused):
    """A calibration of rows of which class 0 may be confused with class 1, or just too confident."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 3, generator=generator, dtype=torch.float64)
    target = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    if confused:
        target = torch.where((target == 0) & (torch.rand(2000, generator=generator) < 0.4), 1, target)
    if name == "class_curves":
        return ClassCalibration(class_curves=fit_isotonic(2 * logits, target).float())
    fit = fit_matrix_scaling(2 * logits, target)
    assert (fit.strength < math.inf) == confused
    return ClassCalibration(class_matrix=fit.class_matrix.float())


@pytest.mark.parametrize(
    ("name", "confused"), [("class_matrix", True), ("class_matrix", False), ("class_curves", True)]
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_and_export_say_the_same(name, confused, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, path = fitted(name, confused), tmp_path / "calibration.onnx"
    expected = module(ROWS)
    assert not expected.isnan().any()
    torch.testing.assert_close(torch.export.export(module, (ROWS,)).module()(ROWS), expected)
    torch.onnx.export(module, (ROWS,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: ROWS.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    (found,) = session.run(None, {session.get_inputs()[0].name: torch.full_like(ROWS, math.nan).numpy()})
    assert torch.from_numpy(found).isnan().all()
