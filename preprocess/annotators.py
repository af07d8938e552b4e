"""Images → control maps for ControlNets.

A map is an RGB image of exactly the source image's size, aligned to it to the pixel: lines are
white on black, near is white, normals facing the viewer are blue, skeletons have OpenPose's colors
and segments ADE20K's. The learned detectors are controlnet_aux's (and transformers' UperNet). They
stretch sides to multiples of 64 pixels: here the image is padded instead, and the map is cropped.

controlnet_aux is imported only when one of its detectors is used, as that takes seconds.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weights import cache
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    import torch

Map = NDArray[np.uint8]  # (H, W, 3)
Detector = Callable[..., Map]  # with an image and options, as controlnet_aux's detectors

MULTIPLE = 64  # pixels: detectors divide sides by this
ANIME_MULTIPLE = 256  # and the detector of anime lines by this
MAX_DETECTORS = 3  # in memory: as many as one request may need


@dataclass(frozen=True)
class AnnotatorSettings:
    """The settings of annotators that a request can change."""

    canny_low_threshold: int  # of a gradient, 1 to 255: an edge continues down to this
    canny_high_threshold: int  # and starts at this


class Detectors:
    """The models of one edition on one device, loaded on first use; the last few stay in memory."""

    def __init__(self, edition: Edition, device: Device) -> None:
        self._edition, self._device = edition, device
        self._loaded: OrderedDict[str, Detector] = OrderedDict()

    def get(self, weights: str) -> Detector:
        """Return the detector of a catalog entry, on the device. Raises a WeightsError."""
        if weights not in self._loaded:
            folder = cache.ensure(weights, self._edition)
            detector = _LOADERS[weights](folder, self._device)
            while len(self._loaded) >= MAX_DETECTORS:
                self._loaded.popitem(last=False)
            self._loaded[weights] = detector
        self._loaded.move_to_end(weights)
        return self._loaded[weights]


Annotate = Callable[[Map, AnnotatorSettings, Detectors], Map]


@dataclass(frozen=True)
class Annotator:
    """How to make one kind of control map."""

    annotate: Annotate
    weights: str | None  # catalog entry of its model; None: it has none
    detects: str  # for the message about an empty map


def annotate(
    name: str, image: Image.Image, settings: AnnotatorSettings, detectors: Detectors
) -> Image.Image:
    """Return the map of an image (mode RGB, any size) by that annotator: RGB, of the same size.

    Raises:
        WeightsError: if its model cannot be downloaded.
    """
    control_map = ANNOTATORS[name].annotate(np.asarray(image), settings, detectors)
    return Image.fromarray(control_map)


def is_empty(control_map: Image.Image) -> bool:
    """Return whether a map has one color only."""
    pixels = np.asarray(control_map)
    return bool((pixels == pixels[0, 0]).all())


def canny(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Return edges (Canny 1986), as controlnet_aux's CannyDetector calls OpenCV."""
    import cv2

    low, high = settings.canny_low_threshold, settings.canny_high_threshold
    edges = cv2.Canny(np.ascontiguousarray(pixels), low, high)
    return np.repeat(np.asarray(edges, dtype=np.uint8)[..., None], 3, axis=-1)


def _learned(weights: str, detects: str, multiple: int = MULTIPLE, **options: bool) -> Annotator:
    """Return an annotator by the detector of a catalog entry, called with these options."""

    def annotate(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
        return _detect(pixels, detectors.get(weights), multiple, **options)

    return Annotator(annotate, weights, detects)


def _detect(pixels: Map, detector: Detector, multiple: int = MULTIPLE, **options: bool) -> Map:
    """Return a detector's map at the image's own resolution, padded by its edges meanwhile."""
    height, width = pixels.shape[:2]
    pad = [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    padded = np.pad(pixels, pad, mode="edge")
    side = min(padded.shape[:2])  # the side that it has, so that nothing is resized
    control_map = detector(
        padded, detect_resolution=side, image_resolution=side, output_type="np", **options
    )
    return np.ascontiguousarray(control_map[:height, :width])


ANNOTATORS: dict[str, Annotator] = {
    "canny": Annotator(canny, None, "edges"),
    # DPT-Hybrid (arXiv:2103.13413), LeReS (arXiv:2012.09365): relative depth
    "depth_midas": _learned("annotator-midas", "differences in depth"),
    "depth_leres": _learned("annotator-leres", "differences in depth"),
    # ZoeDepth (arXiv:2302.12288): metric depth, from its 2nd to its 85th percentile
    "depth_zoe": _learned("annotator-zoe", "differences in depth"),
    # Holistically-nested edges (arXiv:1504.06375), PiDiNet (arXiv:2108.07009)
    "soft_edge_hed": _learned("annotator-hed", "edges"),
    "soft_edge_pidi": _learned("annotator-pidinet", "edges"),
    # Lines as a person would draw them (arXiv:2203.12691)
    "lineart": _learned("annotator-lineart", "lines"),
    "lineart_anime": _learned("annotator-lineart-anime", "lines", ANIME_MULTIPLE),
    # Straight line segments (arXiv:2106.00186)
    "mlsd": _learned("annotator-mlsd", "straight lines"),
    # HED's edges, thinned and drawn again with a thick pen, as lllyasviel/ControlNet does
    "scribble": _learned("annotator-hed", "edges", scribble=True),
    # Skeletons (arXiv:1812.08008) of the body, without hands and faces
    "openpose": _learned("annotator-openpose", "people"),
    # ADE20K's 150 classes by UperNet (arXiv:1807.10221), in their usual colors
    "segmentation": _learned("annotator-upernet", "different things"),
    # Surface normals (arXiv:2109.09881)
    "normal_bae": _learned("annotator-normal-bae", "surfaces"),
}


# Loaders, from a catalog entry's folder, whose files have passed their hashes. Most are pickles, of
# which torch.load reads nothing but tensors and plain values (its default).

Load = Callable[[Path, Device], Detector]


@contextmanager
def _quietly() -> Iterator[None]:
    """Ignore the warnings of importing controlnet_aux, such as on packages that it misses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pretrained(class_name: str) -> Load:
    """Return the loader of one of controlnet_aux's classes."""

    def load(folder: Path, device: Device) -> Detector:
        with _quietly():
            import controlnet_aux

        detector: Detector = getattr(controlnet_aux, class_name).from_pretrained(folder).to(device)
        return detector

    return load


def _load_leres(folder: Path, device: Device) -> Detector:
    """Load LeReS without the second model of its from_pretrained, which only LeReS++ needs.

    That model would also parse this process's command line, and go to the GPU whatever the device.
    """
    import torch

    with _quietly():
        from controlnet_aux import LeresDetector
    from controlnet_aux.leres.leres.multi_depth_model_woauxi import RelDepthModel
    from controlnet_aux.leres.leres.net_tools import strip_prefix_if_present

    checkpoint = torch.load(folder / "res101.pth", map_location="cpu", weights_only=True)
    model = RelDepthModel(backbone="resnext101")
    model.load_state_dict(strip_prefix_if_present(checkpoint["depth_model"], "module."))
    detector: Detector = LeresDetector(model.eval(), None).to(device)
    return detector


def _load_openpose(folder: Path, device: Device) -> Detector:
    """Load OpenPose without its models of hands and faces."""
    with _quietly():
        from controlnet_aux import OpenposeDetector
    from controlnet_aux.open_pose.body import Body

    body = Body(folder / "body_pose_model.pth")
    body.to(device)
    detector: Detector = OpenposeDetector(body)
    return detector


def _load_upernet(folder: Path, device: Device) -> Detector:
    import torch
    from transformers import UperNetForSemanticSegmentation

    with _quietly():
        from controlnet_aux.util import ade_palette
    model = UperNetForSemanticSegmentation.from_pretrained(folder, local_files_only=True)
    model = model.to(device).eval()
    palette = np.array(ade_palette(), dtype=np.uint8)

    def run(pixels: Map, **controlnet_aux_options: object) -> Map:
        with torch.inference_mode():
            logits = model(_normalized(pixels).to(device)).logits[0]  # (150, H, W)
        colors: Map = palette[logits.argmax(dim=0).cpu().numpy()]
        return colors

    return run


def _normalized(pixels: Map) -> torch.Tensor:
    """Return (1, 3, H, W), normalized by ImageNet's mean and deviation, as UperNet takes it."""
    import torch

    unit = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)


_LOADERS: dict[str, Load] = {
    "annotator-hed": _pretrained("HEDdetector"),
    "annotator-pidinet": _pretrained("PidiNetDetector"),
    "annotator-lineart": _pretrained("LineartDetector"),
    "annotator-lineart-anime": _pretrained("LineartAnimeDetector"),
    "annotator-mlsd": _pretrained("MLSDdetector"),
    "annotator-midas": _pretrained("MidasDetector"),
    "annotator-leres": _load_leres,
    "annotator-zoe": _pretrained("ZoeDetector"),
    "annotator-normal-bae": _pretrained("NormalBaeDetector"),
    "annotator-openpose": _load_openpose,
    "annotator-upernet": _load_upernet,
}
