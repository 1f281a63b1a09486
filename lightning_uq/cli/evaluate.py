"""``lightning-uq evaluate``."""

import sys
from pathlib import Path
from typing import Any, Literal

from lightning_uq.cli.errors import UsageError
from lightning_uq.cli.options import Accelerator, Integers, Repeated
from lightning_uq.cli.output import check_writable, make_console, removing_new_directories


def evaluate(
    *,
    run: Repeated,
    data: str,
    out: Path,
    ood: str | None = None,
    model_type: Literal["softmax", "ensemble", "gmm"] = "softmax",
    module: str | None = None,
    network: str | None = None,
    init_args: dict[str, Any] = {},  # noqa: B006  # it is never changed
    data_args: dict[str, Any] = {},  # noqa: B006
    data_seeds: Integers = Integers(),  # noqa: B008  # a tuple
    feature_layer: str = "auto",
    regularization: Literal["held_out", "oas", "ddu"] | float = "held_out",
    accelerator: Accelerator = "cpu",
) -> None:
    """Evaluate trained checkpoints as the DDU experiments do.

    The command measures accuracy, calibration error and the detection of out-of-distribution data by two scores, before and after
    temperature scaling, as mean and standard error over runs. It prints one table, and writes one JSON file and a page (.html) beside it.

    Args:
        run: A Lightning checkpoint, or the checkpoints of an ensemble's members. Repeat --run for each further run.
        data: digits, mnist, fashion_mnist, kmnist, dirty_mnist, cifar10, cifar100, svhn, the path of an .npz file, or the import
            path of a LightningDataModule, my.module:MyDataModule.
        ood: Out-of-distribution data: labels to hold out, such as 8,9; or an image data set, such as svhn; or the name of one of
            the data module's ood_dataloaders(). Without it, detection is not evaluated.
        out: JSON file to write.
        model_type: Scores that detect out-of-distribution data: energy and entropy (softmax), mutual information and entropy
            (ensemble), or feature density and entropy of its posterior (gmm).
        module: Import path of the LightningModule, for checkpoints that do not name theirs.
        network: Import path of a class or function that builds only the network, instead of --module.
        init_args: Arguments of the module or the network.
        data_args: Arguments of the data module, such as {"root": "data", "batch_size": 256}.
        data_seeds: Seeds of the splits that the runs (or the checkpoints) were trained on, such as 1,2,3.
        feature_layer: For gmm, name of the layer whose inputs are the features.
        regularization: For gmm, held_out, oas, ddu (the original's schedule of jitters), or a number.
        accelerator: Device to compute on.
    """
    console = make_console()
    from lightning_uq.evaluate import Settings, evaluate, make_table, write
    from lightning_uq.report import jinja_environment

    settings = Settings(
        runs=run,
        data=data,
        ood=ood,
        model_type=model_type,
        module=module,
        network=network,
        init_args=init_args,
        data_args=data_args,
        data_seeds=data_seeds,
        feature_layer=feature_layer,
        regularization=regularization,
        accelerator=accelerator,
    )
    if out.is_dir():
        raise UsageError(f"--out must be a file, but {out} is a directory.")
    if out.suffix == ".html":
        raise UsageError(
            f"--out must name the JSON file, but {out} is the name of a page. The page is written beside the JSON file."
        )
    jinja_environment()
    with removing_new_directories(out.parent):
        check_writable(out.parent)
        result = evaluate(settings, lambda path: print(path, file=sys.stderr))
        written = write(result, out)
    console.print(make_table(result))
    console.print(f"Wrote {' and '.join(map(str, written))}", highlight=False, soft_wrap=True)
