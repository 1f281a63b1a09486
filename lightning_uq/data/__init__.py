"""Data modules and generators. They download nothing unless asked to."""

from lightning_uq.data.ambiguous_digits import blend_digits
from lightning_uq.data.arrays import ArrayDataModule
from lightning_uq.data.digits import DigitsDataModule
from lightning_uq.data.dirty_mnist import DirtyMNISTDataModule
from lightning_uq.data.environments import (
    draw_from_gp,
    draw_inputs,
    draw_teacher,
    gaussian_inputs,
    gp_posterior,
    nngp_kernel,
    polyadic_inputs,
    teacher_logits,
    weibull_inputs,
)
from lightning_uq.data.image_folder import ImageFolderDataModule
from lightning_uq.data.images import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    KMNISTDataModule,
    MNISTDataModule,
    SVHNDataModule,
)
from lightning_uq.data.indexed import Indexed
from lightning_uq.data.interface import TaskData
from lightning_uq.data.npz import NpzDataModule
from lightning_uq.data.opening import open_data
from lightning_uq.data.regression_sets import DiabetesDataModule, UCIDataModule
from lightning_uq.data.shapes import ShapesDataModule
from lightning_uq.data.splits import stratified_split
from lightning_uq.data.tables import TableDataModule
from lightning_uq.data.testbed import (
    classification_problem,
    gp_classification_problem,
    regression_problem,
    save_problem,
)
from lightning_uq.data.testbed_module import JointDraws, TestbedDataModule
from lightning_uq.data.tokens import next_token_batch
from lightning_uq.data.toy import ToyCurveDataModule, toy_curve, two_moons

__all__ = [
    "ArrayDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DiabetesDataModule",
    "DigitsDataModule",
    "DirtyMNISTDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "Indexed",
    "JointDraws",
    "KMNISTDataModule",
    "MNISTDataModule",
    "NpzDataModule",
    "SVHNDataModule",
    "ShapesDataModule",
    "TableDataModule",
    "TaskData",
    "TestbedDataModule",
    "ToyCurveDataModule",
    "UCIDataModule",
    "blend_digits",
    "classification_problem",
    "draw_from_gp",
    "draw_inputs",
    "draw_teacher",
    "gaussian_inputs",
    "gp_classification_problem",
    "gp_posterior",
    "next_token_batch",
    "nngp_kernel",
    "open_data",
    "polyadic_inputs",
    "regression_problem",
    "save_problem",
    "stratified_split",
    "teacher_logits",
    "toy_curve",
    "two_moons",
    "weibull_inputs",
]
