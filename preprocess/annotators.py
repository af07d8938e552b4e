"""Pictures → control maps: what a ControlNet is told about a picture.

One function each. A map is an RGB picture of exactly the size of the picture it was made of, and
aligned to it to the pixel: lines are white on black, near is white, normals point at the viewer in
blue, skeletons have OpenPose's colours and segments ADE20K's. The learned detectors are
controlnet_aux's (and transformers' UperNet), which stretch what they are given to multiples of 64
pixels: here the picture is padded to those instead, and the map is cut.

Nothing is imported for a request without controls: controlnet_aux brings in all of its detectors at
once, which takes seconds.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from weights import cache
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    import torch

Map = NDArray[np.uint8]  # (H, W, 3)
Detector = Callable[..., Map]  # as controlnet_aux calls its own: of a picture and of options

MULTIPLE = 64  # pixels: what detectors divide sides by
ANIME_MULTIPLE = 256  # the same, of the detector of anime lines
MAX_DETECTORS = 3  # that stay in memory: as many as one request may need


@dataclass(frozen=True)
class AnnotatorSettings:
    """What people may choose about maps."""

    canny_low_threshold: int  # of a gradient, 1 to 255: an edge goes on down to this
    canny_high_threshold: int  # and starts at this


class Detectors:
    """The models of one edition on one device, each loaded when it is first needed.

    The few that were used last stay in memory.
    """

    def __init__(self, edition: Edition, device: Device) -> None:
        self._edition, self._device = edition, device
        self._loaded: OrderedDict[str, Detector] = OrderedDict()

    def get(self, weights: str) -> Detector:
        """The detector of a catalog entry, on the device. Raises a WeightsError."""
        if weights not in self._loaded:
            folder = cache.ensure(weights, self._edition)
            detector = _LOADERS[weights](folder, self._device)
            while len(self._loaded) >= MAX_DETECTORS:
                self._loaded.popitem(last=False)
            self._loaded[weights] = detector
        self._loaded.move_to_end(weights)
        return self._loaded[weights]


def annotate(
    name: str, picture: Image.Image, settings: AnnotatorSettings, detectors: Detectors
) -> Image.Image:
    """The map of a picture (mode RGB, any size) by the annotator of that name: RGB, as large.

    Raises:
        WeightsError: its model cannot be fetched.
    """
    drawn = ANNOTATORS[name].annotate(np.asarray(picture), settings, detectors)
    return Image.fromarray(drawn)


def is_empty(picture: Image.Image) -> bool:
    """Whether a map says nothing: it is of one colour all over."""
    pixels = np.asarray(picture)
    return bool((pixels == pixels[0, 0]).all())


def canny(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Edges (Canny 1986), as controlnet_aux's CannyDetector calls OpenCV."""
    import cv2

    low, high = settings.canny_low_threshold, settings.canny_high_threshold
    return _grey(cv2.Canny(np.ascontiguousarray(pixels), low, high))


def soft_edge_hed(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Holistically-nested edges (arXiv:1504.06375)."""
    return _detected(pixels, detectors.get("annotator-hed"))


def scribble(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """HED's edges, thinned and drawn again with a thick pen, as lllyasviel/ControlNet does."""
    return _detected(pixels, detectors.get("annotator-hed"), scribble=True)


def soft_edge_pidi(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """PiDiNet's edges (arXiv:2108.07009)."""
    return _detected(pixels, detectors.get("annotator-pidinet"))


def lineart(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Lines as a person would draw them (arXiv:2203.12691)."""
    return _detected(pixels, detectors.get("annotator-lineart"))


def lineart_anime(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """The lines that an anime was coloured from."""
    return _detected(pixels, detectors.get("annotator-lineart-anime"), ANIME_MULTIPLE)


def mlsd(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Straight line segments (arXiv:2106.00186)."""
    return _detected(pixels, detectors.get("annotator-mlsd"))


def depth_midas(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Relative depth by DPT-Hybrid (arXiv:2103.13413)."""
    return _detected(pixels, detectors.get("annotator-midas"))


def depth_leres(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Relative depth by LeReS (arXiv:2012.09365)."""
    return _detected(pixels, detectors.get("annotator-leres"))


def depth_zoe(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Metric depth (arXiv:2302.12288), from its 2nd to its 85th percentile."""
    return _detected(pixels, detectors.get("annotator-zoe"))


def normal_bae(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """Surface normals (arXiv:2109.09881)."""
    return _detected(pixels, detectors.get("annotator-normal-bae"))


def openpose(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """People's skeletons (arXiv:1812.08008), of the body: no hands, no faces."""
    return _detected(pixels, detectors.get("annotator-openpose"))


def segmentation(pixels: Map, settings: AnnotatorSettings, detectors: Detectors) -> Map:
    """ADE20K's 150 kinds of things by UperNet (arXiv:1807.10221), in their usual colours."""
    return _uncut(pixels, detectors.get("annotator-upernet"), MULTIPLE)


Annotate = Callable[[Map, AnnotatorSettings, Detectors], Map]


@dataclass(frozen=True)
class Annotator:
    """How a kind of map is made."""

    annotate: Annotate
    weights: str | None  # catalog entry of its model; None: it has none
    looks_for: str  # to people, about a map without any


ANNOTATORS: dict[str, Annotator] = {
    "canny": Annotator(canny, None, "edges"),
    "depth_midas": Annotator(depth_midas, "annotator-midas", "differences in depth"),
    "depth_leres": Annotator(depth_leres, "annotator-leres", "differences in depth"),
    "depth_zoe": Annotator(depth_zoe, "annotator-zoe", "differences in depth"),
    "soft_edge_hed": Annotator(soft_edge_hed, "annotator-hed", "edges"),
    "soft_edge_pidi": Annotator(soft_edge_pidi, "annotator-pidinet", "edges"),
    "lineart": Annotator(lineart, "annotator-lineart", "lines"),
    "lineart_anime": Annotator(lineart_anime, "annotator-lineart-anime", "lines"),
    "mlsd": Annotator(mlsd, "annotator-mlsd", "straight lines"),
    "scribble": Annotator(scribble, "annotator-hed", "edges"),
    "openpose": Annotator(openpose, "annotator-openpose", "people"),
    "segmentation": Annotator(segmentation, "annotator-upernet", "different things"),
    "normal_bae": Annotator(normal_bae, "annotator-normal-bae", "surfaces"),
}


# Around the detectors


def _detected(pixels: Map, detector: Detector, multiple: int = MULTIPLE, **options: bool) -> Map:
    """One of controlnet_aux's detectors on a picture at its own resolution."""

    def run(padded: Map) -> Map:
        side = min(padded.shape[:2])  # as large as it is: nothing is resized
        found: Map = detector(
            padded, detect_resolution=side, image_resolution=side, output_type="np", **options
        )
        return found

    return _uncut(pixels, run, multiple)


def _uncut(pixels: Map, run: Callable[[Map], Map], multiple: int) -> Map:
    """`run` on the picture, padded at the right and below by its edge; the map is cut again."""
    height, width = pixels.shape[:2]
    pad = [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    return np.ascontiguousarray(run(np.pad(pixels, pad, mode="edge"))[:height, :width])


def _grey(values: NDArray[Any]) -> Map:
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=-1)


# How detectors are loaded: from a catalog entry's folder, whose files have passed their hashes.
# Most are pickles. torch.load takes nothing but tensors and plain values from them (its default).

Load = Callable[[Path, Device], Detector]


@contextmanager
def _quietly() -> Iterator[None]:
    """Importing controlnet_aux says which of its detectors lack a package, and more of the kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pretrained(class_name: str) -> Load:
    """One of controlnet_aux's own classes."""

    def load(folder: Path, device: Device) -> Detector:
        with _quietly():
            import controlnet_aux

        detector: Detector = getattr(controlnet_aux, class_name).from_pretrained(folder).to(device)
        return detector

    return load


def _load_leres(folder: Path, device: Device) -> Detector:
    """Without the second model of its from_pretrained, which LeReS++ alone needs.

    That one would also read this process's command line, and go to the GPU whatever the device.
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
    """Without the models of hands and faces."""
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

    def run(pixels: Map) -> Map:
        with torch.inference_mode():
            logits = model(_normalised(pixels).to(device)).logits[0]  # (150, H, W)
        kinds = logits.argmax(dim=0).cpu().numpy()
        colours: Map = palette[kinds]
        return colours

    return run


def _normalised(pixels: Map) -> torch.Tensor:
    """(1, 3, H, W), as ImageNet's mean and spread make it: what UperNet was trained on."""
    import torch

    unit = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, spread = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)


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
