from __future__ import annotations

import pytest
import torch

from kernels.product import FEW, LEAST, WORTH, fast_products, product, summed_product

SIZES = [
    (1, 1, 1),
    (0, 20, 30),
    (LEAST, LEAST, LEAST),
    (WORTH // LEAST**2, LEAST, LEAST),
    (WORTH // 40 // 40, 40, 40),
    (WORTH // 1600 + 1, 40, 40),
    (200, 200, 220),
    (50, 7, 90),
    (50, 90, 7),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "inner", "outer"), SIZES)
def test_product(rows, inner, outer, biased, dtype) -> None:
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((rows, inner), (outer, inner), (outer,)))
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    found = product(x, weight, bias if biased else None)
    assert found.dtype == dtype
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-1}
    torch.testing.assert_close(found.double(), expected, **close)
    strided = torch.cat((x, x), dim=1)[:, inner:]
    torch.testing.assert_close(product(strided, weight.T.contiguous().T, bias if biased else None), found, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "inner", "outer"), [*SIZES, (40, 1, FEW), (40, 1, FEW + 1), (250, 180, 190)])
def test_summed_product(rows, inner, outer, dtype) -> None:
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(rows, outer).to(dtype)
    found = summed_product(a, b)
    assert found.dtype == dtype
    assert found.is_contiguous()
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-1}
    torch.testing.assert_close(found.double(), a.double().T @ b.double(), **close)
    torch.testing.assert_close(summed_product(torch.cat((a, a), dim=1)[:, :inner], b), found, **close)


def test_what_cancels_is_not_lost() -> None:
    a = torch.randn(4096, 1)
    both = torch.cat((a * 1e6, torch.ones(1, 1), -a * 1e6))
    assert summed_product(both, torch.ones(8193, 1)).item() == 1


@pytest.mark.skipif(not fast_products(), reason="needs a processor with AVX-512")
def test_wide_products_go_by_onednn() -> None:
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        product(x, weight)
        summed_product(x, weight)
    names = [event.key for event in profile.key_averages()]
    assert not any(name in ("aten::mm", "aten::addmm", "aten::linear") for name in names)
    assert any("mkldnn" in name for name in names)
