"""The compatibility objective: exact cases, its masks, and where answers begin and end."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cairn.data.text.feed import Samples
from cairn.errors import InputError
from cairn.options import configure
from cairn.training.distillation import divergence
from cairn.training.objectives.compatible import Compatible, answer_weights, compatible_losses, from_old
from cairn.training.run import fork


def logits(seed, shape=(2, 5, 11)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


TARGETS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(9))
ONES = torch.ones(2, 5)


def test_a_student_that_agrees_where_it_is_taught_has_no_loss():
    old, new = logits(0), logits(1)
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    student = torch.where(mask[..., None], old, new)
    assert compatible_losses(student, old, new, TARGETS, mask).abs().max() < 1e-6


def test_the_gradient_is_that_of_a_plain_reference_and_the_mask_has_none():
    old, new = logits(0), logits(1)
    student, plain = (logits(3).requires_grad_() for _ in range(2))
    mask = from_old(student, old, TARGETS, ONES)
    assert not mask.requires_grad and (mask == (student.argmax(-1) != TARGETS)).all()
    compatible_losses(student, old, new, TARGETS, mask, temperature=2.0, cross_entropy=0.5).sum().backward()
    teacher = torch.where(mask[..., None], old, new)
    reference = F.kl_div((plain / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="sum")
    (reference + 0.5 * F.cross_entropy(plain.flatten(0, 1), TARGETS.flatten(), reduction="sum")).backward()
    assert (student.grad - plain.grad).abs().max() < 1e-6


def test_a_student_that_is_always_right_learns_from_the_new_model_alone():
    student = logits(4) + 20 * F.one_hot(TARGETS, 11)
    mask = from_old(student, logits(0), TARGETS, ONES)
    assert not mask.any()
    assert torch.equal(compatible_losses(student, logits(0), logits(1), TARGETS, mask), divergence(logits(1), student))


def test_the_other_masks_are_what_they_say():
    student, old = logits(5), logits(6)
    assert (from_old(student, old, TARGETS, ONES, "old_right") == (old.argmax(-1) == TARGETS)).all()
    assert from_old(student, old, TARGETS, ONES, "old").all() and not from_old(student, old, TARGETS, ONES, "new").any()
    ours, theirs = (each.log_softmax(-1).gather(-1, TARGETS[..., None])[..., 0] for each in (student, old))
    assert (from_old(student, old, TARGETS, ONES, "likelihood") == (ours < theirs)).all()
    half = torch.tensor([[1.0, 1, 0, 0, 0]] * 2)
    expected = ((ours < theirs) * 0 + ((ours * half).sum(1) < (theirs * half).sum(1))[:, None]).bool()
    assert (from_old(student, old, TARGETS, half, "likelihood_sequence") == expected).all()


def test_only_answers_count_up_to_their_end():
    """Rows of ids: 0 begins a document, 7 8 is the marker, 9 the end."""
    tokens = np.array([[0, 1, 7, 8, 5, 6, 9, 0, 2, 7], [5, 6, 9, 3, 7, 1, 7, 8, 4, 9]])
    found = answer_weights(tokens, np.ones((2, 9), np.float32), [7, 8], [9])
    assert found.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1, 1]]
    assert answer_weights(tokens, np.zeros((2, 9), np.float32), [7, 8], [9]).sum() == 0, "what had no weight gets none"


def test_the_objective_hands_over_the_weights_of_answers_alone():
    tokens = np.array([[0, 1, 7, 5, 9, 0]])
    samples = Samples(tokens, None, np.ones((1, 5), np.float32), np.zeros(1, int), np.zeros(1, int))
    assert Compatible(marker=[7], end=[9]).arrays(samples)["weights"].tolist() == [[0, 0, 1, 1, 0]]
    assert Compatible().arrays(samples)["weights"].sum() == 5


def test_an_update_is_trained_from_the_new_model_and_leans_on_the_old_one(small_run, tmp_path):
    old, new = small_run.checkpoints()[0], small_run.checkpoints()[-1]
    options = ["objective={name: compatible, marker: [220], end: [13]}", f"teacher={{old: {old}, new: {new}}}"]
    run = fork(new, tmp_path / "update", [*options, "training.tokens=24 steps"], fresh=["optimizer"])
    rows = run.metrics()
    assert len(rows) == 4 and all(0 < row["loss"] < 1 and 0 < row["from_old"] <= 1 for row in rows)
    alone = fork(new, tmp_path / "alone", ["objective={name: compatible, marker: [220], end: [13]}", "training.tokens=22 steps"], fresh=["optimizer"])
    assert alone.metrics()[0]["loss"] > rows[0]["loss"]


def test_a_marker_that_never_comes_is_told(small_run, tmp_path):
    with pytest.raises(InputError, match="no position of the batch counts"):
        fork(small_run.checkpoints()[-1], tmp_path / "none", ["objective={name: compatible, marker: [1, 2, 3], end: [4]}", "training.tokens=22 steps"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"marker": [1]}, "marker and end belong together"), ({"temperature": 0}, "temperature")],
)
def test_half_a_set_of_options_is_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        configure("objective", {"name": "compatible", **options})
