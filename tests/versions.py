"""What the oldest supported torch, 2.6, cannot do. docs/export.md tells users."""

import pytest
import torch

TORCH_2_6 = torch.__version__ < "2.7"
VMAP_EXPORT = "torch.export of torch.vmap"
ONNX_EXPORT = "ONNX of BatchNorm, of a batched product with any number of rows, and of a compiled network"
SWA_FILES = "a checkpoint under SWA without a function inside, which `weights_only=True` refuses"

NESTED_EXPORT = "torch.export of `nn.TransformerEncoder` with a padding mask, whose fast path makes nested tensors"


def skip_on_torch_2_6(missing: str, if_true: bool = True) -> None:
    """Skip the test that runs, because torch 2.6 lacks what is named."""
    if TORCH_2_6 and if_true:
        pytest.skip(f"torch 2.6 lacks {missing}")
