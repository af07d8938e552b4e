"""Masks from faces that were found; YuNet's own file cannot be had where the tests run."""

import cv2
import numpy as np
import pytest
from PIL import Image

from preprocess import segment
from preprocess.segment import FACE_FLOOR, FACE_SIDES, Box, face_masks, mask_of_faces
from weights import cache
from weights.catalog import Edition


class FakeYuNet:
    """cv2.FaceDetectorYN that finds every bright rectangle, in the format of OpenCV's."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size

    @classmethod
    def create(cls, model, config, size, score, overlap):
        assert model.endswith(".onnx")
        assert config == ""
        assert 0 < score < 1
        assert 0 < overlap < 1
        return cls(size)

    def detect(self, pixels):
        assert pixels.shape == (self._size[1], self._size[0], 3)
        assert pixels.flags.c_contiguous
        found = cv2.connectedComponentsWithStats((pixels[..., 0] > 127).astype(np.uint8))[2][1:]
        rows = np.zeros((len(found), 15), np.float32)
        rows[:, :4], rows[:, 14] = found[:, :4], 0.9
        return 1, rows if len(rows) else None


@pytest.fixture
def yunet(monkeypatch, tmp_path):
    (tmp_path / "face.onnx").touch()
    monkeypatch.setattr(cache, "ensure", lambda name, edition: tmp_path)
    monkeypatch.setattr(cv2, "FaceDetectorYN", FakeYuNet)


def photo(size, *boxes) -> Image.Image:
    """Blue on black: red where blue should be finds nothing."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for x, y, w, h in boxes:
        pixels[y : y + h, x : x + w, 2] = 255
    return Image.fromarray(pixels)


def test_several_faces_in_one_photo_make_one_mask(yunet):
    photos = [
        photo((300, 200), (20, 30, 60, 80), (200, 50, 60, 80)),
        photo((200, 300), (80, 100, 50, 70)),
    ]
    first, second = face_masks(photos, Edition.FULL)
    assert (first.mode, first.size) == ("L", (300, 200))
    assert first.getpixel((50, 70)) == first.getpixel((230, 90)) == 255
    assert first.getpixel((140, 150)) == FACE_FLOOR
    assert second.size == (200, 300)
    assert second.getpixel((105, 135)) == 255
    assert second.getpixel((50, 70)) == FACE_FLOOR


def test_a_photo_without_a_face_counts_everywhere_and_the_log_says_so(yunet, capsys):
    photos = [photo((64, 64), (20, 20, 20, 20)), photo((64, 48))]
    masks = face_masks(photos, Edition.FULL)
    assert masks[0].getextrema() == (FACE_FLOOR, 255)
    assert masks[1].getextrema() == (255, 255)
    assert capsys.readouterr().out == "No face was found in image 2 of 2: it is not masked\n"


def test_boxes_are_in_pixels_of_a_large_photo(yunet):
    big = photo((2000, 1500), (1000, 500, 400, 500))
    boxes = list(segment._find_faces(cache.ensure("yunet", Edition.FULL) / "face.onnx", big))
    assert len(boxes) == len(FACE_SIDES)
    for box in boxes:
        assert (box.x, box.y) == pytest.approx((1000, 500), abs=8)
        assert (box.width, box.height) == pytest.approx((400, 500), abs=16)


def test_a_small_photo_is_not_enlarged(yunet, monkeypatch):
    sizes = []

    class Watched(FakeYuNet):
        def __init__(self, size) -> None:
            sizes.append(size)
            super().__init__(size)

    monkeypatch.setattr(cv2, "FaceDetectorYN", Watched)
    face_masks([photo((90, 60)), photo((3000, 4))], Edition.FULL)
    assert sizes == [(90, 60), (90, 60), (320, 1), (640, 1)]


def test_the_oval_covers_the_face_and_not_the_corners():
    mask = np.asarray(mask_of_faces((100, 100), [Box(30, 20, 40, 60)]))
    assert mask[20:80, 50].min() == mask[50, 30:70].min() == 255
    assert mask[20, 30] == mask[79, 69] == FACE_FLOOR
    assert set(np.unique(mask)) == {FACE_FLOOR, 255}


def test_faces_may_overlap_and_stick_out():
    faces = [Box(-20, -20, 50, 50), Box(10, 10, 30, 30), Box(90, 90, 40, 40), Box(300, 300, 9, 9)]
    mask = np.asarray(mask_of_faces((100, 100), faces))
    assert mask.shape == (100, 100)
    assert mask[0, 0] == mask[25, 25] == mask[99, 99] == 255
    assert mask[0, 99] == FACE_FLOOR


def test_no_faces_at_all_leave_the_floor():
    assert mask_of_faces((3, 2), []).getextrema() == (FACE_FLOOR, FACE_FLOOR)
