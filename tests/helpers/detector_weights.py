"""Files as control maps' detectors are published: the real architectures, with chance values.

`write(entry, folder)` writes what a catalog entry names.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from preprocess.annotators import _quietly


def write(entry: str, folder: Path) -> None:
    with _quietly():
        import controlnet_aux  # noqa: F401  warns at its first import

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    _WRITERS[entry](folder)


def _hed(folder: Path) -> None:
    from controlnet_aux.hed import ControlNetHED_Apache2

    torch.save(ControlNetHED_Apache2().state_dict(), folder / "ControlNetHED.pth")


def _pidinet(folder: Path) -> None:
    from controlnet_aux.pidi.model import pidinet

    torch.save({"state_dict": _parallel(pidinet())}, folder / "table5_pidinet.pth")


def _mlsd(folder: Path) -> None:
    from controlnet_aux.mlsd.models.mbv2_mlsd_large import MobileV2_MLSD_Large

    torch.save(MobileV2_MLSD_Large().state_dict(), folder / "mlsd_large_512_fp32.pth")


def _midas(folder: Path) -> None:
    from controlnet_aux.midas.midas.dpt_depth import DPTDepthModel

    model = DPTDepthModel(path=None, backbone="vitb_rn50_384", non_negative=True)
    torch.save(model.state_dict(), folder / "dpt_hybrid-midas-501f0c75.pt")


def _leres(folder: Path) -> None:
    from controlnet_aux.leres.leres.multi_depth_model_woauxi import RelDepthModel

    model = RelDepthModel(backbone="resnext101")
    torch.save({"depth_model": _parallel(model)}, folder / "res101.pth")


def _zoe(folder: Path) -> None:
    from controlnet_aux.zoe.zoedepth.models.zoedepth.zoedepth_v1 import ZoeDepth
    from controlnet_aux.zoe.zoedepth.utils.config import get_config

    model = ZoeDepth.build_from_config(get_config("zoedepth", "infer"))
    torch.save({"model": model.state_dict()}, folder / "ZoeD_M12_N.pt")


def _openpose(folder: Path) -> None:
    from controlnet_aux.open_pose.model import bodypose_model

    # Its reader looks each name up without its first part.
    state = {key.partition(".")[2]: value for key, value in bodypose_model().state_dict().items()}
    torch.save(state, folder / "body_pose_model.pth")


def _normal_bae(folder: Path) -> None:
    from controlnet_aux.normalbae.nets.NNET import NNET

    settings = {"mode": "client", "architecture": "BN", "pretrained": "scannet"}
    model = NNET(SimpleNamespace(**settings, sampling_ratio=0.4, importance_ratio=0.7))
    torch.save({"model": _parallel(model)}, folder / "scannet.pt")


def _lineart(folder: Path) -> None:
    from controlnet_aux.lineart import Generator

    for name in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), folder / name)


def _lineart_anime(folder: Path) -> None:
    from controlnet_aux.lineart_anime import UnetGenerator

    norm = functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
    torch.save(_parallel(UnetGenerator(3, 1, 8, 64, norm_layer=norm)), folder / "netG.pth")


def _upernet(folder: Path) -> None:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    widths = [96, 192, 384, 768]  # "small"
    backbone = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=widths, out_features=stages)
    config = UperNetConfig(
        backbone_config=backbone, num_labels=150, auxiliary_in_channels=384, hidden_size=512
    )
    model = UperNetForSemanticSegmentation(config)
    config.architectures = ["UperNetForSemanticSegmentation"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _parallel(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names that nn.DataParallel gives them."""
    return {f"module.{key}": value for key, value in model.state_dict().items()}


_WRITERS: dict[str, Callable[[Path], None]] = {
    "annotator-hed": _hed,
    "annotator-pidinet": _pidinet,
    "annotator-mlsd": _mlsd,
    "annotator-midas": _midas,
    "annotator-leres": _leres,
    "annotator-zoe": _zoe,
    "annotator-openpose": _openpose,
    "annotator-normal-bae": _normal_bae,
    "annotator-lineart": _lineart,
    "annotator-lineart-anime": _lineart_anime,
    "annotator-upernet": _upernet,
}
