"""Every kernel computes the same product; the choice among them follows the device."""

from __future__ import annotations

import pytest
import torch

from medusa import linear
from medusa.linear import Kernel, kernel_for

CPU = torch.device("cpu")
# What each kernel may lose, relative to the product of the same weights in float64: rounding of its result, no more.
TOLERANCE = {
    Kernel.PLAIN: 1e-2,
    Kernel.ONEDNN: 1e-2,
    Kernel.FBGEMM: 1e-5,
    Kernel.NATIVE: 1e-5,  # of inputs that are bfloat16, which tiles do not round
    Kernel.NATIVE_INT8: 2e-2,
}


@pytest.mark.parametrize("kernel", Kernel)
def test_every_kernel_is_as_exact_as_its_arithmetic(kernel: Kernel) -> None:
    weight = (torch.randn(70, 34) * 0.1).bfloat16()
    try:
        multiply = kernel.prepare(weight)
    except RuntimeError as error:
        pytest.skip(f"this CPU has no {kernel.value}: {error}")
    for shape in ((1,), (5,), (64,), (2, 3)):
        x = torch.randn(*shape, 34).bfloat16().to(kernel.activation_dtype(torch.bfloat16))
        out = multiply(x)
        assert out.dtype == x.dtype
        assert out.shape == (*shape, 70)
        want = x.double() @ weight.double().t()
        torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[kernel], atol=TOLERANCE[kernel])


def test_the_exact_types_and_other_devices_stay_plain() -> None:
    assert kernel_for(torch.float32, CPU) is Kernel.PLAIN
    assert kernel_for(torch.float64, CPU) is Kernel.PLAIN
    assert kernel_for(torch.bfloat16, torch.device("cuda")) is Kernel.PLAIN


@pytest.mark.parametrize(
    ("features", "compiles", "dtype", "kernel"),
    [
        ({"avx2": True, "avx512_bf16": True}, True, torch.bfloat16, Kernel.ONEDNN),
        ({"avx2": True, "avx512_bf16": True, "amx_tile": True}, True, torch.bfloat16, Kernel.NATIVE),
        ({"avx2": True, "avx512_bf16": True, "amx_tile": True}, False, torch.bfloat16, Kernel.ONEDNN),
        ({"avx2": True, "avx512_bf16": True}, True, torch.float16, Kernel.FBGEMM),
        ({"avx2": True}, True, torch.bfloat16, Kernel.NATIVE),
        ({"avx2": True}, False, torch.bfloat16, Kernel.FBGEMM),
        ({}, True, torch.bfloat16, Kernel.NATIVE),
        ({}, False, torch.bfloat16, Kernel.PLAIN),
    ],
)
def test_the_kernel_follows_what_the_cpu_multiplies_well(
    features: dict[str, bool], compiles: bool, dtype: torch.dtype, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(linear, "library", lambda: object() if compiles else None)
    monkeypatch.setattr(linear, "has_tiles", lambda: "amx_tile" in features)
    assert kernel_for(dtype, CPU) is kernel
