from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels.product import fast_products
from pipelines.training.cpu import FastDropout, FastLinear, speed_up

avx512 = pytest.mark.skipif(not fast_products(), reason="needs a processor with AVX-512")


@avx512
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 24, 40), (1, 7, 1), (33, 5, 3), (2, 1, 9), (0, 4, 3)])
def test_linear_is_linear(rows, inputs, outputs, bias):
    torch.manual_seed(0)
    plain, fast = nn.Linear(inputs, outputs, bias=bias), FastLinear(inputs, outputs, bias=bias)
    fast.load_state_dict(plain.state_dict())
    x, weights = torch.randn(rows, inputs), torch.randn(rows, outputs)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    left, right = plain(a), fast(b)
    torch.testing.assert_close(right, left, rtol=1e-5, atol=1e-5)
    (left * weights).sum().backward()
    (right * weights).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(dict(fast.named_parameters())[name].grad, parameter.grad, rtol=1e-5, atol=1e-5)


@avx512
def test_gradients_against_finite_differences():
    """A gradient with strides, as a sum or a transpose leaves it, is read rightly."""
    torch.manual_seed(0)
    fast = FastLinear(6, 4)
    x = torch.randn(5, 6, requires_grad=True)
    fast(x).t().matmul(torch.ones(5, 2)).sum().backward()
    torch.testing.assert_close(x.grad, 2 * fast.weight.sum(0).expand(5, 6))
    torch.testing.assert_close(fast.weight.grad, 2 * x.detach().sum(0).expand(4, 6))


@avx512
def test_other_inputs_go_the_usual_way():
    fast = FastLinear(3, 2)
    assert fast(torch.zeros(4, 5, 3)).shape == (4, 5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(torch.zeros(4, 3)).dtype == torch.bfloat16


@avx512
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(1)
    x = torch.ones(1001, 1003)
    y = FastDropout(p)(x)
    assert abs((y == 0).float().mean().item() - p) < 0.002
    assert y[y != 0].unique().numel() == 1
    assert abs(y.mean().item() - 1) < 0.01
    columns = (y == 0).float().mean(0)  # every lane of the random words is as likely
    assert (columns - p).abs().max() < 0.08
    for lane in range(4):
        assert abs((y.flatten()[lane::4] == 0).float().mean().item() - p) < 0.003


@avx512
def test_dropout_passes_the_same_values_back():
    x = torch.ones(50, 7, requires_grad=True)
    y = FastDropout(0.4)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


@avx512
def test_dropout_follows_the_seed_and_evaluation_mode():
    layer, x = FastDropout(0.3), torch.ones(10, 10)
    torch.manual_seed(3)
    one = layer(x)
    torch.manual_seed(3)
    assert torch.equal(one, layer(x))
    assert not torch.equal(one, layer(x))
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(FastDropout(0.0)(x), x)


@avx512
def test_speeding_up_keeps_names_and_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Sequential(nn.Linear(3, 1)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model.eval()(torch.ones(2, 4))
    speed_up(model)
    assert isinstance(model[2][0], FastLinear)
    assert isinstance(model[1], FastDropout)
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model(torch.ones(2, 4)), expected)
