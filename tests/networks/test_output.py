import pytest
import torch

from lightning_uq.errors import InputError
from lightning_uq.networks.output import OutputReader, check_class_logits

LOGITS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("output", "raw"),
    [
        ("logits", LOGITS),
        ("log_probs", LOGITS.log_softmax(-1)),
        ("probs", LOGITS.softmax(-1)),
        (lambda out: out["logits"], {"logits": LOGITS}),
        (lambda out: out[1], (None, LOGITS)),
    ],
)
def test_each_form_gives_the_same_probabilities(output, raw):
    torch.testing.assert_close(OutputReader(output)(raw).softmax(-1), LOGITS.softmax(-1))


def test_a_probability_of_zero_stays_finite():
    assert OutputReader("probs")(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("raw", [{"logits": LOGITS}, (LOGITS, LOGITS), None])
def test_what_is_no_tensor_names_the_argument(raw):
    with pytest.raises(InputError, match="`output` a function that picks the logits"):
        OutputReader()(raw)


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="'probabilities'"):
        OutputReader("probabilities")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_probabilities_are_noticed_in_every_precision(dtype, classes):
    probs = (3 * torch.randn(1, 64, classes, dtype=torch.float64)).softmax(2).to(dtype)
    with pytest.raises(InputError, match='output="probs"'):
        check_class_logits(probs, None, "logits")


def test_probabilities_taken_for_logits_are_noticed():
    with pytest.raises(InputError, match='output="probs"'):
        check_class_logits(LOGITS.softmax(2), 3, "logits")
    check_class_logits(LOGITS.softmax(2), 3, "probs")
    check_class_logits(LOGITS, 3, "logits")
    check_class_logits(torch.zeros(1, 4, 3), 3, "logits")  # a zero-initialised head


def test_features_are_not_logits():
    with pytest.raises(InputError, match=r"3 logits \(argument `num_classes`\), but it returned 512"):
        check_class_logits(torch.zeros(1, 2, 512), 3, "logits")
    with pytest.raises(InputError, match="C >= 2"):
        check_class_logits(torch.zeros(1, 2, 1), None, "logits")
