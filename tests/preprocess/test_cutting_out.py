"""From a saliency to a cut-out: the stretch, the largest subject, the soft mask, and pictures without a subject."""

from __future__ import annotations

import cutting_out as subject
import image_preprocessing
import numpy as np
import pytest
from PIL import Image

BLUE = (10, 40, 200)


def blob(side: int = 64, at: tuple[int, int] = (20, 24), radius: float = 10, peak: float = 1.0) -> np.ndarray:
    """Saliency [S, S] of a soft disc: `peak` inside, fading out over 4 pixels."""
    y, x = np.mgrid[:side, :side]
    return (peak * np.clip((radius - np.hypot(y - at[0], x - at[1])) / 4 + 0.5, 0, 1)).astype(np.float32)


def alpha_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.getchannel("A"))


def test_levels_are_the_squeezed_picture() -> None:
    picture = Image.new("RGB", (80, 40), BLUE)
    found = subject.levels_for_network(picture, 16)
    assert (found.shape, found.dtype) == ((1, 3, 16, 16), np.float32)
    np.testing.assert_array_equal(found[0, :, 3, 5], BLUE)


def test_masks_are_stretched() -> None:
    found = subject.mask_levels(blob(peak=0.6) + 0.2)
    assert (found.min(), found.max(), found.dtype) == (0, 255, np.uint8)
    assert subject.mask_levels(np.full((4, 4), 0.7, np.float32)).max() == 0, "of a flat saliency, without a division by zero"


def test_a_single_subject_keeps_its_soft_mask_and_its_colours() -> None:
    saliency = blob()
    levels = subject.mask_levels(saliency)
    np.testing.assert_array_equal(subject.largest_subject(levels), levels)
    picture = Image.new("RGB", (128, 96), BLUE)
    found = subject.cut_out(picture, saliency)
    assert found.size == picture.size and (np.asarray(found)[..., :3] == BLUE).all()
    alpha = alpha_of(found)
    assert {0, 255} < set(alpha.ravel()), "the edge is soft"
    assert alpha[30, 48] == 255 and alpha[90, 120] == 0
    assert subject.share(found) == pytest.approx(saliency.mean(), abs=0.01)


def test_the_largest_of_several_subjects_stays() -> None:
    large, small = blob(at=(20, 20), radius=12), blob(at=(48, 48), radius=6)
    found = subject.largest_subject(subject.mask_levels(np.maximum(large, small)))
    np.testing.assert_array_equal(found, subject.mask_levels(large))
    # The larger one is what is surely found, not what is faintly joined.
    faint = np.maximum(blob(at=(20, 20), radius=8), 0.4 * (blob(at=(44, 44), radius=18) > 0))
    assert subject.largest_subject(subject.mask_levels(faint))[20, 20] == 255
    assert subject.largest_subject(subject.mask_levels(faint))[44, 44] == 0


def test_thin_faint_parts_stay_with_their_subject() -> None:
    chair = blob(at=(16, 32), radius=9)
    chair[22:50, 30:32] = 0.35  # a leg that the network sees less surely
    chair[44:50, 28:34] = 0.9
    found = subject.largest_subject(subject.mask_levels(chair))
    assert found[47, 30] > 200 and found[36, 31] > 60


def test_haze_goes_so_that_the_crop_is_tight() -> None:
    hazy = np.maximum(blob(), 0.03 * (np.arange(64) % 2)[:, None].astype(np.float32))
    found = subject.cut_out(Image.new("RGB", (64, 64), BLUE), hazy)
    box = found.getchannel("A").getbbox()
    assert box is not None and box[0] > 8 and box[2] < 40
    shown = (image_preprocessing.square(found, 200) != 255).any(axis=2).mean()
    assert 0.4 < shown < 0.85 * 0.85 * np.pi / 4 + 0.05, "a disc that spans 85 % of the side"


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        (blob(peak=0.3), "found a saliency of at most 0.30"),
        (np.zeros((64, 64), np.float32), "found a saliency of at most 0.00"),
        (blob(side=320, radius=1.5), "found at most 0.0"),
    ],
)
def test_nothing_found(saliency: np.ndarray, message: str) -> None:
    with pytest.raises(image_preprocessing.InvalidImage) as caught:
        subject.cut_out(Image.new("RGB", (64, 64), BLUE), saliency)
    assert message in str(caught.value) and "\nhint: remove_background=False" in str(caught.value)


def test_a_cut_out_file_gives_the_same_pixels() -> None:
    found = subject.cut_out(Image.new("RGB", (90, 70), BLUE), blob())
    again = image_preprocessing.decode(subject.png(found))
    np.testing.assert_array_equal(image_preprocessing.square(again, 28), image_preprocessing.square(found, 28))
    assert subject.share(again.convert("RGB")) == 1.0
