"""Linear layers equal torch's in value and gradient, alone and together, whichever library makes the product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cairn.models.kernels import linear
from cairn.models.kernels.linear import Linear, matmul, together

ROWS, WIDTH, WIDTHS = 96, 24, (40, 8, 8)


def drawn(bias: bool = False) -> tuple[Tensor, list[Linear]]:
    torch.manual_seed(0)
    layers = [Linear(WIDTH, width, bias=bias) for width in WIDTHS]
    return torch.randn(2, ROWS // 2, WIDTH, requires_grad=True), layers


def results(x: Tensor, layers: list[Linear], outputs: list[Tensor]) -> list[Tensor]:
    loss = sum((out.sin() * (i + 1)).sum() for i, out in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [x, *(parameter for layer in layers for parameter in layer.parameters())])]


def expected(x: Tensor, layers: list[Linear]) -> list[Tensor]:
    return results(x, layers, [F.linear(x, layer.weight, layer.bias) for layer in layers])


@pytest.fixture(params=["torch's own", "oneDNN"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "oneDNN" and not linear.available():
        pytest.skip("this processor has no oneDNN products")
    monkeypatch.setattr(linear, "_FASTER", request.param == "oneDNN")
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_values_and_gradients(bias: bool, compiled: bool, library: str) -> None:
    x, layers = drawn(bias)
    torch._dynamo.reset()
    run = torch.compile(together, backend="aot_eager") if compiled else together
    torch.testing.assert_close(results(x, layers, run(x, *layers)), expected(x, layers))


def test_one_product_serves_all(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    x, layers = drawn()
    shapes, products = [], []
    whole, product = linear.linear, linear.product
    monkeypatch.setattr(linear, "linear", lambda x, weight: shapes.append((*x.shape, len(weight))) or whole(x, weight))
    monkeypatch.setattr(linear, "product", lambda a, b: products.append((*a.shape, b.shape[1])) or product(a, b))
    together(x, *layers)
    assert shapes == [(2, ROWS // 2, WIDTH, sum(WIDTHS))]
    assert products == ([(ROWS, WIDTH, sum(WIDTHS))] if library == "oneDNN" else [])


def test_what_hangs_on_a_layer_is_honoured() -> None:
    x, layers = drawn()
    seen = []
    layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    together(x, *layers)
    assert seen == [(2, ROWS // 2, WIDTHS[1])]
    nn.utils.parametrizations.weight_norm(layers[2])
    torch.testing.assert_close(together(x, *layers)[2], F.linear(x, layers[2].weight))


def test_product_of_transposed_and_few_rows(library: str) -> None:
    torch.manual_seed(0)
    for rows in (3, 64):
        a, b = torch.randn(rows, 20), torch.randn(30, 20)
        torch.testing.assert_close(matmul(a, b.t()), a @ b.t())
        torch.testing.assert_close(matmul(a, b.t().contiguous()), a @ b.t())
