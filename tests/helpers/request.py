"""The request that most tests change: one fast, unchecked and unmarked image of a known seed."""

from generation.options import GenerationRequest

REQUEST = GenerationRequest(
    prompt="a large red circle on a blue background",
    seed=1,
    disable_safety_checker=True,
    apply_watermark=False,
    embed_parameters=False,
)
