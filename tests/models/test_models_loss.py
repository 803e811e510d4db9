"""The fused losses equal cross_entropy on whole logits, in value and gradient, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cairn.models.kernels import loss as losses
from cairn.models.kernels.linear import Linear
from cairn.models.kernels.loss import linear_cross_entropy, linear_token_losses

ROWS, WIDTH, VOCABULARY = 150, 12, 33


@pytest.fixture(params=[64, 10**9], ids=["chunks of 64 rows", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", request.param * 4 * VOCABULARY)


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator) * (torch.rand(ROWS, generator=generator) > 0.3)
    return hidden, weight, targets, weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, z: float) -> Tensor:
    logits = hidden @ weight.t()
    return (weights * (F.cross_entropy(logits, targets, reduction="none") + z * logits.logsumexp(-1) ** 2)).sum()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("z", [0.0, 0.05])
def test_sum_and_gradients(z: float) -> None:
    hidden, weight, targets, weights = drawn(torch.float64)
    loss, nll = linear_cross_entropy(hidden, weight, targets, weights, z)
    wanted = plain(hidden, weight, targets, weights.double(), z)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(nll, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"))
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(3 * wanted, (hidden, weight)))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights, z)[0], (hidden, weight), fast_mode=True)


@pytest.fixture(params=["kernel", "torch"])
def softmax(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(losses, "_library", lambda: None)
    elif losses._library() is None:
        pytest.skip("no C compiler, so no kernel")


@pytest.mark.usefixtures("chunks", "softmax")
@pytest.mark.parametrize("vocabulary", [5, 16, 33, 96])
@pytest.mark.parametrize("z", [0.0, 0.05])
def test_float32_is_float64_rounded(vocabulary: int, z: float) -> None:
    hidden, weight, targets, weights = drawn(torch.float32)
    weight, targets = weight.detach()[torch.arange(vocabulary) % VOCABULARY].requires_grad_(), targets % vocabulary
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss, nll = linear_cross_entropy(hidden, weight, targets, weights, z)
    wanted = plain(*exact, targets, weights.double(), z)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none"), rtol=1e-5, atol=1e-5)
    each = (linear_token_losses(hidden, weight, targets).square().sum(), F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="none").square().sum())
    for found, reference in ((loss, wanted), each):
        for got, gradient in zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(reference, exact), strict=True):
            torch.testing.assert_close(got.double(), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("softmax")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    hidden, weight, targets, _ = drawn(torch.float32)
    spoiled = hidden.detach().clone()
    spoiled[3, 0] = bad
    loss, nll = linear_cross_entropy(spoiled, weight, targets, torch.ones(ROWS))
    assert not loss.isfinite() and (~nll.isfinite()).nonzero().tolist() == [[3]]


@pytest.mark.usefixtures("chunks")
def test_rows_of_weight_zero_may_hold_anything() -> None:
    hidden, weight, targets, weights = drawn(torch.float32)
    padded = torch.where(weights == 0, -100, targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, padded, weights)[0], linear_cross_entropy(hidden, weight, targets, weights)[0])


@pytest.mark.usefixtures("chunks")
def test_each_token_is_differentiable() -> None:
    hidden, weight, targets, _ = drawn(torch.float64)
    targets[::7] = -1
    nll = linear_token_losses(hidden, weight, targets)
    wanted = F.cross_entropy(hidden @ weight.t(), targets, reduction="none", ignore_index=-1)
    torch.testing.assert_close(nll, wanted)
    square = (nll.square().sum(), wanted.square().sum())
    torch.testing.assert_close(*(torch.autograd.grad(s, (hidden, weight)) for s in square))
    assert torch.autograd.gradcheck(lambda h, w: linear_token_losses(h, w, targets), (hidden, weight), fast_mode=True)


def test_low_precision_stays_close_to_float32() -> None:
    hidden, weight, targets, weights = drawn(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    loss, _ = linear_cross_entropy(low, weight, targets, weights)
    exact = plain(low.float(), weight.bfloat16().float(), targets, weights, 0.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    found, wanted = torch.autograd.grad(loss, (low, weight)), torch.autograd.grad(plain(hidden, weight, targets, weights, 0.0), (hidden, weight))
    for got, reference in zip(found, wanted, strict=True):
        assert (got.float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.usefixtures("softmax")
def test_only_what_is_asked_for_is_computed() -> None:
    hidden, weight, targets, weights = drawn(torch.float32)
    weight.requires_grad_(False)
    loss, _ = linear_cross_entropy(hidden, weight, targets, weights)
    loss.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets)[0].requires_grad


@pytest.mark.usefixtures("softmax")
def test_certain_and_impossible_tokens() -> None:
    hidden = torch.eye(2, dtype=torch.float32) * 200
    loss, nll = linear_cross_entropy(hidden, torch.eye(2), torch.tensor([0, 0]))
    assert nll.tolist() == [0.0, 200.0] and loss.item() == 200.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (2, 50, 24), (3, 24)])
def test_the_fast_linear_layer_is_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = Linear(24, 17, bias=bias), torch.randn(shape, requires_grad=True)
    found, wanted = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, wanted)
    inputs = (x, *layer.parameters())
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(wanted.square().sum(), inputs), rtol=1e-4, atol=1e-4)
    assert layer.double()(x.double()).dtype == torch.float64
