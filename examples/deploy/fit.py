"""From the checkpoint of a finished training to `model-uq.ckpt`: a density, a temperature and an alarm. No Trainer."""

import sys
from pathlib import Path

from torch.utils.data import DataLoader
from train import DigitsClassifier, digits

from lightning_uq import FitGMM, OODAlarm, TemperatureScaling, save_fitted

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = DigitsClassifier.load_from_checkpoint(folder / "best.ckpt", weights_only=True)
    training, held_out = DataLoader(digits("train"), 128), DataLoader(digits("held_out"), 128)

    gmm = FitGMM(held_out=DataLoader(digits("validation"), 128)).fit(model, training)
    temperature = TemperatureScaling().fit(model, held_out)
    # Neither the network, nor its choice by `val_loss`, nor the density has seen the held-out rows: the alarm's rate rests on that.
    alarm = OODAlarm(score="ood_score", false_alarm_rate=0.05).fit(model, held_out, after=[gmm, temperature])

    save_fitted(folder / "model-uq.ckpt", model, [gmm, temperature, alarm])
