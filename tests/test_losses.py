"""The losses against numbers worked out by hand and against the closed form of their gradient."""

import math

import pytest
import torch

from zephyr.losses import branch_sums, dpo_loss, sft_loss
from zephyr.packing import Group, Pack

EXACT = 1e-14  # float64 against a few operations of math


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def three_pairs():
    """Policy and reference log-probs of three pairs with beta = 0.5 and margins ln 3, 0, -ln 3."""
    ln3 = math.log(3)
    policy = float64(-10 + 2 * ln3, -20, -30), float64(-12, -25, -31 + ln3)
    reference = float64(-10, -18, -30 + ln3), float64(-12, -23, -31)
    return *policy, *reference, 0.5


def random_pairs(n=50, dtype=torch.float64, spread=20):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(4, n, generator=generator, dtype=torch.float64).to(dtype)
    return list(-100 + spread * draw)


def test_dpo_loss_of_three_pairs_by_hand():
    """With r = beta (log pi - log pi_ref), beta = 0.5, and the loss -ln sigma(r_w - r_l):

    1. r_w = 0.5 * 2 ln 3 = ln 3, r_l = 0: margin ln 3, sigma = 1 / (1 + 1/3) = 3/4, loss ln(4/3).
    2. both fell by 2 nats: r_w = r_l = -1, margin 0, sigma = 1/2, loss ln 2.
    3. r_w = -ln 3 / 2, r_l = ln 3 / 2: margin -ln 3, sigma = 1 / (1 + 3) = 1/4, loss ln 4.
    """
    losses, chosen, rejected = dpo_loss(*three_pairs())
    expected = [math.log(4 / 3), math.log(2), math.log(4)]
    assert losses.tolist() == pytest.approx(expected, rel=EXACT)
    half = math.log(3) / 2
    assert chosen.tolist() == pytest.approx([2 * half, -1, -half], rel=EXACT)
    assert rejected.tolist() == pytest.approx([0, -1, half], rel=EXACT)


def test_label_smoothing_mixes_in_the_loss_of_the_flipped_pair_by_hand():
    """Flipping a pair negates its margin: ln(4/3) <-> ln 4, ln 2 <-> ln 2. A tenth of each."""
    losses, *rewards = dpo_loss(*three_pairs(), label_smoothing=0.1)
    right, wrong = math.log(4 / 3), math.log(4)
    mixed = [0.9 * right + 0.1 * wrong, math.log(2), 0.9 * wrong + 0.1 * right]
    assert losses.tolist() == pytest.approx(mixed, rel=EXACT)
    for smoothed, plain in zip(rewards, dpo_loss(*three_pairs())[1:], strict=True):
        assert torch.equal(smoothed, plain)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_ln_2_and_the_rewards_are_0_where_policy_and_reference_are_equal(
    label_smoothing,
):
    chosen, rejected, *_ = random_pairs(dtype=torch.float32)
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, 0.1, label_smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * len(losses), rel=1e-7)
    assert all(not reward.any() for reward in rewards)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_gradient_of_dpo_is_its_closed_form(label_smoothing):
    """d -ln sigma(m) / dm = -sigma(-m) and dm / d log pi(chosen) = beta, so the gradient in the
    chosen answer is -beta sigma(-m); a flipped label adds beta sigma(m) in its share. The rejected
    answer gets the opposite, the reference the opposite of both."""
    beta, pairs = 0.3, [x.requires_grad_() for x in random_pairs(spread=5)]
    losses, *_ = dpo_loss(*pairs, beta, label_smoothing)
    gradients = torch.autograd.grad(losses.sum(), pairs)
    with torch.no_grad():
        margin = beta * (pairs[0] - pairs[2] - (pairs[1] - pairs[3]))
        right, wrong = 1 / (1 + margin.exp()), 1 / (1 + (-margin).exp())  # sigma(-m), sigma(m)
        expected = -beta * ((1 - label_smoothing) * right - label_smoothing * wrong)
    for gradient, sign in zip(gradients, (1, -1, -1, 1), strict=True):
        assert torch.allclose(gradient, sign * expected, rtol=1e-12, atol=0)


def test_extreme_margins_stay_finite():
    """-ln sigma(m) tends to 0 and its slope to 0 for large m, to -m and a slope of -1 below."""
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zero = torch.zeros(2)
    losses, *_ = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    assert losses.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(losses.sum(), chosen)[0].tolist() == [0.0, -1.0]


def test_rewards_carry_no_gradient_and_losses_do():
    policy_chosen, policy_rejected, *reference = random_pairs()
    policy_chosen.requires_grad_()
    losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, *reference, 0.1)
    assert losses.requires_grad
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_keep_the_dtype_of_the_log_probs(dtype):
    pairs = random_pairs(dtype=dtype)
    pack = Pack.from_groups([Group([1], [[2, 3]], [[True, True]])])
    results = [*dpo_loss(*pairs, 0.1), sft_loss(pairs[0]), branch_sums(pairs[0][:2], pack)]
    assert {result.dtype for result in results} == {dtype}


def test_sft_loss_is_minus_the_sum():
    logps = float64(-1.5, -0.25, -2).requires_grad_()
    loss = sft_loss(logps)
    assert loss.shape == ()
    assert loss.item() == 3.75
    assert torch.autograd.grad(loss, logps)[0].tolist() == [-1, -1, -1]
    assert sft_loss(float64()).item() == 0


def test_branch_sums_by_hand():
    """Two groups of two branches. Targets per branch: 2, 1, 0 (all masked out) and 3."""
    yes, no = True, False
    pair = Group([1], [[2, 3], [4, 5]], [[yes, yes], [no, yes]])
    other = Group([1], [[2], [3, 4, 5]], [[no], [yes, yes, yes]])
    pack = Pack.from_groups([pair, other])
    logps = float64(-1, -2, -4, -8, -16, -32).requires_grad_()
    sums = branch_sums(logps, pack)
    assert sums.tolist() == [-3, -4, 0, -56]
    weights = float64(1, 10, 100, 1000)
    gradient = torch.autograd.grad((weights * sums).sum(), logps)[0]
    assert gradient.tolist() == [1, 1, 10, 1000, 1000, 1000]


def test_branch_sums_of_an_empty_pack_are_none():
    assert branch_sums(float64(), Pack.from_groups([])).shape == (0,)
