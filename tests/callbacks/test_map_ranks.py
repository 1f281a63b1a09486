"""Two ranks give what one gives of maps, also where a rank has no image."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_uq import DeterministicModule
from lightning_uq.callbacks import FitGMM, FitKNN, OODDetection, TemperatureScaling
from tests.callbacks.test_map_densities import Strided
from tests.callbacks.test_maps import TASK, images, loader, strange

SIZES = {"odd": (5, 3, 5), "one image": (1, 1, 1)}
"""Numbers of images to validate, to test, and out of distribution."""


class Still(DeterministicModule):
    """Does not learn, so that only the reading of data may differ between ranks."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(devices, num_val, num_test, num_ood):
    torch.manual_seed(0)
    module = Still(Strided(), task=TASK)
    far = {"noise": DataLoader(strange(num_ood), batch_size=3)}
    scaling, gmm = TemperatureScaling(), FitGMM(pool="positions", regularization=1e-3)
    knn = FitKNN(k=2, pool="positions", max_rows=30)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[scaling, gmm, knn, OODDetection(far), OODDetection(far, "predictive_entropy", level="pixel")],
    )
    trainer.fit(module, loader(7), loader(num_val, 1))
    (tested,) = trainer.test(module, loader(num_test, 2), verbose=False)
    scores = gmm.score(module, [images(2, 3)[0].double()])
    bank = knn.state_dict()["tensors"]["neighbors"]
    numbers = {"temperature": scaling.temperature, "density": scores.sum(), "bank": bank.double().sum()}
    found = {**tested, **{name: float(value) for name, value in numbers.items()}, "rows": len(bank[0])}
    return trainer, found


SCRIPT = """
import json, warnings
from tests.callbacks.test_map_ranks import SIZES, run

warnings.filterwarnings("ignore")

if __name__ == "__main__":
    found = {}
    for name, sizes in SIZES.items():
        trainer, found[name] = run(2, *sizes)
    with open(out if trainer.is_global_zero else out + "1", "w") as file:
        json.dump(found, file)
    trainer.strategy.barrier()
"""


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_give_what_one_gives(run_script, tmp_path):
    first, second = run_script(SCRIPT, timeout=100), json.loads((tmp_path / "out.json1").read_text())
    for name, sizes in SIZES.items():
        _, alone = run(1, *sizes)
        assert {"test_miou", "test_ece", "ood_auroc/noise/density/max"} <= alone.keys()
        assert "ood_auroc/noise/predictive_entropy/pixel" in alone
        assert alone["rows"] == 30
        assert first[name] == pytest.approx(alone, rel=1e-6, abs=1e-9), name
        assert second[name] == pytest.approx(alone, rel=1e-6, abs=1e-9), name
