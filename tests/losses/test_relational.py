import math

import pytest
import torch

from losses.relational import cosines, relational_loss


def reference(student, teacher, valid):
    """Eqs. 11-12 by loops over pairs, float64."""

    def cosine(a, b):
        return float(a @ b) / (float(a.norm()) * float(b.norm()))

    chosen = [k for k in range(len(valid)) if valid[k]]
    pairs = [
        abs(cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])) for i in chosen for j in chosen if i != j
    ]
    return sum(pairs) / max(1, len(chosen) ** 2)


def test_by_hand():
    student, teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert relational_loss(student, teacher, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(0.5)


def test_equals_the_reference_for_other_widths_and_missing_tokens():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    loss = relational_loss(student, teacher, valid)
    assert loss.dtype == torch.float32 and loss.shape == (4,)
    for clip in range(4):
        assert loss[clip].item() == pytest.approx(reference(student[clip], teacher[clip], valid[clip]), abs=1e-6)
    assert loss[2].item() == pytest.approx(0, abs=1e-6) and loss[3] == 0  # one token, no token


def test_scale_and_rotation_do_not_matter():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(1, 5, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert relational_loss(student, 7 * student @ rotation, everything).item() == pytest.approx(0, abs=1e-6)


def test_constant_and_zero_features_are_finite():
    everything = torch.ones(1, 3, dtype=torch.bool)
    student = torch.zeros(1, 3, 4, requires_grad=True)
    loss = relational_loss(student, torch.ones(1, 3, 4), everything)
    assert loss.item() == pytest.approx(1)  # cosines 0 against 1, the diagonal too
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert relational_loss(torch.ones(1, 3, 2), torch.ones(1, 3, 4), everything).item() == pytest.approx(0, abs=1e-6)


def test_invalid_tokens_and_the_teacher_get_no_gradient():
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(1, 4, 3, generator=generator).requires_grad_()
    teacher = torch.randn(1, 4, 3, generator=generator)
    teacher[0, 3] = math.nan
    teacher.requires_grad_()
    relational_loss(student, teacher, torch.tensor([[True, True, True, False]])).sum().backward()
    assert teacher.grad is None and not student.grad[0, 3].any()
    assert torch.isfinite(student.grad).all() and student.grad[0, :3].abs().max() > 0


def test_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 4, 3, generator=generator).requires_grad_()
    teacher = torch.randn(2, 4, 5, generator=generator)
    everything = torch.ones(2, 4, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(relational_loss(student, teacher, everything).sum(), student)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ends = [relational_loss(student + s * 1e-3 * direction, teacher, everything).sum() for s in (1, -1)]
    assert ((ends[0] - ends[1]) / 2e-3).item() == pytest.approx(gradient.norm().item(), rel=1e-2)
    assert cosines(student.detach())[0].diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-6)
