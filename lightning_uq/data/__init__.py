"""Data modules and generators; none of them downloads anything by itself."""

from lightning_uq.data.arrays import ArrayDataModule, NpzDataModule, stratified_split
from lightning_uq.data.digits import DigitsDataModule
from lightning_uq.data.images import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DirtyMNISTDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    KMNISTDataModule,
    MNISTDataModule,
    SVHNDataModule,
    blend_digits,
)
from lightning_uq.data.indexed import Indexed
from lightning_uq.data.toy import ToyCurveDataModule, toy_curve, two_moons

__all__ = [
    "ArrayDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "DirtyMNISTDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "Indexed",
    "KMNISTDataModule",
    "MNISTDataModule",
    "NpzDataModule",
    "SVHNDataModule",
    "ToyCurveDataModule",
    "blend_digits",
    "stratified_split",
    "toy_curve",
    "two_moons",
]
