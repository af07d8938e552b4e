"""The losses against their formulas, on tensors small enough to work out by hand."""

import pytest
import torch

from training.losses import masked_error, signal_to_noise, snr_weights


def test_signal_to_noise():
    alphas = torch.tensor([0.9, 0.5, 0.1, 0.0])
    found = signal_to_noise(alphas, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(found[:3], torch.tensor([9.0, 1.0, 1 / 9]))
    assert 0 < found[3] < 1e-6  # a schedule that ends in pure noise


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
    found = snr_weights(torch.tensor([snr]), 5.0, prediction)
    torch.testing.assert_close(found, torch.tensor([weight]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_gamma_0_weighs_all_noise_alike(prediction):
    assert snr_weights(torch.tensor([0.01, 50.0]), 0.0, prediction).tolist() == [1, 1]


def test_both_predictions_weigh_the_clean_picture_alike():
    """An error of the noise is SNR, one of the velocity SNR + 1 times that of the picture."""
    snr = torch.tensor([0.1, 1.0, 20.0])
    epsilon = snr_weights(snr, 5.0, "epsilon") * snr
    velocity = snr_weights(snr, 5.0, "v_prediction") * (snr + 1)
    torch.testing.assert_close(epsilon, velocity)


def error_of(mask: torch.Tensor, error: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    wanted = torch.zeros(len(mask), 4, *mask.shape[-2:])
    return masked_error(wanted + error, wanted, mask, floor)


def test_a_mask_of_one_everywhere_is_the_mean_square():
    predicted, wanted = torch.randn(2, 3, 4, 5, 6).unbind()
    found = masked_error(predicted, wanted, torch.ones(3, 1, 5, 6), 0.1)
    torch.testing.assert_close(found, (predicted - wanted).square().mean(dim=(1, 2, 3)))


def test_a_small_subject_counts_as_much_as_a_large_one():
    small, large = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    small[..., :2, :2] = 1
    large[..., :6, :6] = 1
    found = error_of(torch.cat([small, large]), torch.tensor(2.0))
    torch.testing.assert_close(found, torch.tensor([4.0, 4.0]))


def test_each_picture_has_its_own_mask_area():
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
    found = masked_error(predicted, torch.zeros_like(predicted), torch.ones(1, 1, 2, 2), 0.1)
    assert found.dtype == torch.float32
    assert found.item() == 90000
