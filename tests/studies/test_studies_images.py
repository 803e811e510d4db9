"""Autoencoders that learn from each other's images: the bound, the pools, and what is drawn."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from cairn.studies.continual import collapse, images


def constant(probabilities):
    """A model whose latents say nothing: the posterior is the prior, and each pixel has its own probability."""
    model = images.Autoencoder()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder[2].bias.copy_(torch.logit(probabilities))
    return model


def test_the_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-3, 2, 40).reshape(5, 8)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(images.divergence(mean, log_variance), expected, atol=1e-5)


def test_the_bound_is_the_likelihood_where_latents_say_nothing_and_below_it_elsewhere():
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(784, generator=generator) * 0.8 + 0.1
    pictures, noise = torch.bernoulli(probabilities.expand(6, -1), generator=generator), torch.randn(6, 8, generator=generator)
    exact = Bernoulli(probabilities).log_prob(pictures).sum(1)
    model = constant(probabilities)
    assert torch.allclose(model.elbo(pictures, noise), exact, atol=1e-2)
    with torch.no_grad():
        model.encoder[2].bias.copy_(torch.cat([torch.full((8,), 0.5), torch.zeros(8)]))
    assert torch.allclose(model.elbo(pictures, noise), exact - 8 * 0.5**2 / 2, atol=1e-2)
    # Where latents matter: below the likelihood that averaging over the prior finds.
    torch.manual_seed(2)
    model = images.Autoencoder()
    prior = torch.randn(20_000, 8, generator=generator)
    with torch.no_grad():
        likelihood = Bernoulli(logits=model.decoder(prior)).log_prob(pictures[0]).sum(1).logsumexp(0) - math.log(len(prior))
        bound = torch.stack([model.elbo(pictures[:1], torch.randn(1, 8, generator=generator))[0] for _ in range(200)]).mean()
    assert bound < likelihood


def test_pools_hold_as_many_of_each_as_the_policy_says():
    sets = [torch.full((30, 1), float(number)) for number in range(3)]
    for policy, expected in (("replace", [0, 0, 30]), ("accumulate", [30, 30, 30]), ("subsample", [10, 10, 10])):
        found = images.pooled(policy, sets, torch.Generator().manual_seed(0))
        assert [int((found == number).sum()) for number in range(3)] == expected
    whole = images.pooled("accumulate", [torch.arange(30.0)[:, None]] * 2, torch.Generator().manual_seed(0))
    assert torch.bincount(whole.flatten().long()).tolist() == [2] * 30, "without replacement"


def test_what_is_drawn_is_the_plain_distribution_and_the_classes_are_counted():
    probabilities = torch.linspace(0.02, 0.98, 784)
    drawn = images.sampled(constant(probabilities), 4000, torch.Generator().manual_seed(3))
    z = (drawn.mean(0) - probabilities) / (probabilities * (1 - probabilities) / 4000).sqrt()
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and z.pow(2).mean() == pytest.approx(1, abs=0.2)
    judged = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1]), 10).float()
    assert images.class_entropy(torch.nn.Identity(), judged) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_all_policies_begin_with_the_same_generation_and_swapped_names_fail(real_data):
    found = images.image_arms(99, lambda text: None, steps=20)
    assert len({found[policy]["elbo"][0] for policy in images.POLICIES}) == 1
    assert images.image_arms(99, lambda text: None, steps=20) == found
    made = {"replace": {"elbo": [-100.0, -130.0]}, "accumulate": {"elbo": [-100.0, -105.0]}}
    apart = collapse._fall(made["replace"]) - collapse._fall(made["accumulate"])
    assert apart == 25
