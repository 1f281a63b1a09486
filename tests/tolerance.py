"""How far apart two results of one computation may lie."""

import torch


def tolerance(dtype: torch.dtype, roundings: int = 128) -> dict[str, float]:
    """``rtol`` and ``atol`` for results that were computed in ``dtype`` by calls that differ.

    A sum of floating-point numbers depends on the order of its terms. That order depends on the shape of the batch, the
    number of threads, the width of the processor's vectors and the BLAS library, and each library has its own exponential.
    So two batch shapes, two processes or two processors give results that differ by a few roundings. Only the very same
    call with the same arguments in the same process gives the same bits.

    A test that compares calls which differ runs the network in float64 (``precision="64-true"``, ``module.double()`` and
    float64 data): there 1e-9 leaves room for rounding, and every defect is far larger. Where float32 itself is tested, the
    tolerance comes from here. Bit equality is for the very same call.

    Args:
        dtype: The dtype of the computation, which may be coarser than that of the result.
        roundings: How many roundings the results may be apart. More than the default needs a reason beside the call.

    Example:
        >>> tolerance(torch.float32)
        {'rtol': 1.52587890625e-05, 'atol': 1.52587890625e-05}
        >>> tolerance(torch.float64)["rtol"] < 1e-13
        True
    """
    bound = roundings * torch.finfo(dtype).eps
    return {"rtol": bound, "atol": bound}
