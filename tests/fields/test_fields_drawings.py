"""Variational autoencoders: the bound and its terms, noise that a resume repeats, and what is drawn."""

import json
import math
import signal

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from cairn.errors import InputError
from cairn.evaluation.measure import evaluate
from cairn.fields.vision.autoencoder import drawn
from cairn.fields.vision.families.vae import Vae
from cairn.fields.vision.objectives.elbo import divergence, latent_noise, log_likelihood
from cairn.randomness import normal
from cairn.training.run import resume, train
from tests import ready


def constant(probabilities):
    """A model of images 4 x 4 whose latents say nothing: the posterior is the prior, and each pixel has its own probability."""
    model = Vae(image_size=4, num_channels=1, hidden_sizes=[8], latent_size=3).build(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decoder.layers[-1].bias.copy_(torch.logit(probabilities))
    return model


def bound(model, pictures, noise):
    made = model(pictures, noise)
    return log_likelihood(made.logits, pictures) - divergence(made.mean, made.log_variance)


def test_normal_numbers_are_normal_and_belong_to_their_counter():
    found = normal(5, np.arange(20000))
    assert abs(found.mean()) < 0.03 and abs(found.std() - 1) < 0.02 and abs((found**3).mean()) < 0.1 and abs((found**4).mean() - 3) < 0.2
    assert (normal(5, np.arange(100, 200)) == found[100:200]).all() and (normal(6, np.arange(5)) != found[:5]).all()
    keys = np.array([3, 2**63 + 5], np.uint64)
    assert (latent_noise(keys, 4)[1] == latent_noise(keys[1:], 4)[0]).all() and (latent_noise(keys, 4)[0] == latent_noise(keys, 6)[0, :4]).all()


def test_the_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-3, 2, 40).reshape(5, 8)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(divergence(mean, log_variance), expected, atol=1e-5)


def test_the_bound_is_the_likelihood_where_latents_say_nothing_and_below_it_elsewhere():
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(16, generator=generator) * 0.8 + 0.1
    pictures = torch.bernoulli(probabilities.expand(6, -1), generator=generator).view(6, 1, 4, 4)
    noise = torch.randn(6, 3, generator=generator)
    exact = Bernoulli(probabilities).log_prob(pictures.flatten(1)).sum(1)
    model = constant(probabilities)
    assert torch.allclose(bound(model, pictures, noise), exact, atol=1e-4)
    with torch.no_grad():
        model.encoder.layers[-1].bias.copy_(torch.cat([torch.full((3,), 0.5), torch.zeros(3)]))
    assert torch.allclose(bound(model, pictures, noise), exact - 3 * 0.5**2 / 2, atol=1e-4)
    # Where latents matter: below the likelihood that averaging over the prior finds.
    model = Vae(image_size=4, num_channels=1, hidden_sizes=[8], latent_size=3).build(2)
    with torch.no_grad():
        made = model.decode(torch.randn(20_000, 3, generator=generator)).flatten(1)
        likelihood = Bernoulli(logits=made).log_prob(pictures[0].flatten()).sum(1).logsumexp(0) - math.log(len(made))
        mean = torch.stack([bound(model, pictures[:1], torch.randn(1, 3, generator=generator))[0] for _ in range(100)]).mean()
    assert mean < likelihood


def test_what_is_drawn_is_the_plain_distribution_and_fewer_are_the_first_of_more():
    probabilities = torch.linspace(0.02, 0.98, 16)
    images = drawn(constant(probabilities), 4000, 3)
    z = (images.reshape(4000, 16).mean(0) / 255 - probabilities.numpy()) / np.sqrt((probabilities * (1 - probabilities) / 4000).numpy())
    assert images.shape == (4000, 4, 4, 1) and set(np.unique(images)) == {0, 255} and (z**2).mean() < 2.5
    assert (drawn(constant(probabilities), 50, 3) == images[:50]).all() and (drawn(constant(probabilities), 50, 4) != images[:50]).any()
    assert drawn(constant(probabilities), 0, 3).shape == (0, 4, 4, 1)


KILLED = """
import json, os, pathlib, signal, sys, time
from cairn.training.loop import Trainer
update = Trainer.update
def dies(self, batches):
    if self.progress.step == 6:
        while not pathlib.Path(sys.argv[2], "checkpoints/step-00000004/manifest.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batches)
Trainer.update = dies
from cairn.training.run import train
train(json.loads(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_run_goes_on_with_the_same_bits(drawing_recipe, drawing_run, tmp_path):
    assert ready.code(KILLED, json.dumps(drawing_recipe), str(tmp_path / "cut")).wait(120) == -signal.SIGKILL
    again = resume(tmp_path / "cut")
    assert again.newest().digest == drawing_run.newest().digest
    assert [row["loss"] for row in again.metrics()] == [row["loss"] for row in drawing_run.metrics()]


def test_it_is_measured_by_its_bound_and_the_loss_is_its_negative(drawing_run):
    (row,) = evaluate(drawing_run.newest())
    last, first = drawing_run.metrics()[-1], drawing_run.metrics()[0]
    assert row.metric == "elbo" and row.n > 20 and last["loss"] < first["loss"]
    assert last["loss"] == pytest.approx(last["divergence"] - last["likelihood"], rel=1e-5)
    assert row.value == pytest.approx(-last["loss"], rel=0.2)


def test_a_broken_weight_leaves_no_figure(drawing_run):
    from cairn.fields.vision.measurements.elbo import EvidenceBound
    from cairn.fields.vision.processor import ImageProcessor
    from cairn.training.sources import open_data

    model, processor = drawing_run.newest().model(), ImageProcessor.load(drawing_run.newest().path)
    with torch.no_grad():
        model.decoder.layers[0].bias[0] = torch.nan
    (score,) = EvidenceBound().of(model, processor, open_data(drawing_run.recipe.data, 7, processor)[1])
    assert math.isnan(score.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.mean=[0.5]"], "probabilities from 0 to 1; set data.mean"),
        (["model={name: mlp}"], "A 'mlp' has no latents"),
        (["objective=classification"], "A 'vae' has no classes"),
        (["objective.latents=7"], "objective.latents is 7, and the model has 3"),
        (["model.latent_size=0"], "latent_size"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence_before_anything_is_written(overrides, sentence, drawing_recipe, tmp_path):
    with pytest.raises(InputError, match=sentence):
        train(drawing_recipe, tmp_path / "r", overrides)
    assert not (tmp_path / "r").exists()


def test_images_without_labels_are_read_and_cannot_be_told_apart(drawing_recipe, image_recipe, image_file, tmp_path):
    np.savez(tmp_path / "plain.npz", images=np.load(image_file)["images"])
    source = f"data.sources.bars.images={tmp_path / 'plain.npz'}"
    run = train(drawing_recipe, tmp_path / "r", [source, "training.samples=2 steps"])
    assert run.newest().step == 2
    with pytest.raises(InputError, match="of one class"):
        train(image_recipe, tmp_path / "s", [source])


def test_a_measurement_of_another_family_is_refused(drawing_run, image_run):
    with pytest.raises(InputError, match="A 'vae' has no classes, so it has no accuracy"):
        evaluate(drawing_run.newest(), ["accuracy"], store=False)
    with pytest.raises(InputError, match="A 'vit' has no latents"):
        evaluate(image_run.newest(), ["elbo"], store=False)
