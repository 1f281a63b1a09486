"""How a rank ends without the clean-up of its interpreter, during which gloo's threads now and then abort the process."""

import atexit
import multiprocessing
import os

from lightning.pytorch import Callback, LightningModule, Trainer


class LeaveAtOnce(Callback):
    """For Trainers with ``strategy="ddp_spawn"``: a rank that has finished its run skips the interpreter's clean-up.

    Lightning calls ``teardown`` after a successful run only, so the exit status of a failed rank stays.
    """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if multiprocessing.parent_process() is not None:
            atexit.register(os._exit, 0)  # results are in the parent's queue by then
