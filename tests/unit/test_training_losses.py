"""The losses against their formulas, on tensors small enough to work out by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from training.losses import masked_mse, min_snr_weights


def weights(snr: list[float], gamma: float, prediction: str) -> torch.Tensor:
    """Of a scheduler whose timesteps have these signal-to-noise ratios."""
    ratios = torch.tensor(snr)
    scheduler = DDPMScheduler(num_train_timesteps=len(snr), prediction_type=prediction)
    scheduler.alphas_cumprod = ratios / (1 + ratios)
    return min_snr_weights(scheduler, torch.arange(len(snr)), gamma)


@pytest.mark.parametrize(
    ("snr", "prediction", "weight"),
    [
        (10.0, "epsilon", 0.5),
        (2.0, "epsilon", 1.0),
        (10.0, "v_prediction", 5 / 11),
        (2.0, "v_prediction", 2 / 3),
    ],
)
def test_min_snr(snr, prediction, weight):
    found = weights([snr], 5.0, prediction)
    torch.testing.assert_close(found, torch.tensor([weight]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_gamma_0_weighs_all_noise_alike(prediction):
    assert weights([0.01, 50.0], 0.0, prediction).tolist() == [1, 1]


@pytest.mark.parametrize(("prediction", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_a_schedule_that_ends_in_pure_noise(prediction, weight):
    assert weights([0.0], 5.0, prediction).tolist() == pytest.approx([weight], abs=1e-6)


def test_both_predictions_weigh_the_clean_image_alike():
    """An error of the noise is SNR, one of the velocity SNR + 1 times that of the image."""
    snr = [0.1, 1.0, 20.0]
    epsilon = weights(snr, 5.0, "epsilon") * torch.tensor(snr)
    velocity = weights(snr, 5.0, "v_prediction") * (torch.tensor(snr) + 1)
    torch.testing.assert_close(epsilon, velocity)


def error_of(mask: torch.Tensor, error: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    target = torch.zeros(len(mask), 4, *mask.shape[-2:])
    return masked_mse(target + error, target, mask, floor)


def test_a_mask_of_one_everywhere_is_the_mean_square():
    predicted, target = torch.randn(2, 3, 4, 5, 6).unbind()
    found = masked_mse(predicted, target, torch.ones(3, 1, 5, 6), 0.1)
    torch.testing.assert_close(found, (predicted - target).square().mean(dim=(1, 2, 3)))


def test_a_small_subject_counts_as_much_as_a_large_one():
    small, large = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    small[..., :2, :2] = 1
    large[..., :6, :6] = 1
    found = error_of(torch.cat([small, large]), torch.tensor(2.0))
    torch.testing.assert_close(found, torch.tensor([4.0, 4.0]))


def test_each_image_has_its_own_mask_area():
    """Not the batch's: one that is nearly empty would vanish beside a full one."""
    masks = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)])
    masks[1, 0, 0, 0] = 1
    error = torch.zeros(2, 4, 4, 4)
    error[1, :, 0, 0] = 3
    torch.testing.assert_close(error_of(masks, error), torch.tensor([0.0, 9.0]))


def test_outside_the_mask_the_floor_counts():
    mask = torch.zeros(1, 1, 1, 2)
    mask[..., 0] = 1
    error = torch.tensor([0.0, 1.0]).expand(1, 4, 1, 2)  # only outside
    torch.testing.assert_close(error_of(mask, error, 0.25), torch.tensor([0.25 / 1.25]))


def test_an_empty_mask_is_finite():
    assert error_of(torch.zeros(1, 1, 2, 2), torch.tensor(1.0)).isfinite().all()


def test_the_error_is_computed_in_fp32():
    predicted = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)  # its square is not fp16
    found = masked_mse(predicted, torch.zeros_like(predicted), torch.ones(1, 1, 2, 2), 0.1)
    assert found.dtype == torch.float32
    assert found.item() == 90000
