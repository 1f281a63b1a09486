"""From `model-uq.ckpt` to what the service reads: `model.onnx` and the monitor's first state, `monitor.json`."""

import sys
from pathlib import Path

from train import digits

from lightning_uq import DriftMonitor, OODAlarm, export_fitted, load_fitted

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fitted = load_fitted(folder / "model-uq.ckpt")  # imports the class `train.DigitsClassifier`, which the file names
    export_fitted(fitted, folder / "model.onnx", digits("held_out").tensors[0][:8])

    alarm = OODAlarm.from_checkpoint(folder / "model-uq.ckpt")
    (folder / "monitor.json").write_text(DriftMonitor(alarm, false_alarm_probability=0.05).to_json())
