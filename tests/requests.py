"""A request with every value as predict.py's defaults have it; tests change what they test."""

from generation.request import GenerationRequest, Margins

REQUEST = GenerationRequest(
    prompt="a large red circle on a blue background",
    negative_prompt="",
    image=None,
    mask=None,
    width=None,
    height=None,
    num_outputs=1,
    scheduler=None,
    num_inference_steps=None,
    guidance_scale=None,
    prompt_strength=0.8,
    mask_from_alpha=False,
    mask_invert=False,
    mask_blur=8,
    masked_content="original",
    inpaint_area="whole_picture",
    inpaint_padding=32,
    outpaint=Margins(0, 0, 0, 0),
    refine="no_refiner",
    high_noise_frac=0.8,
    refine_steps=None,
    replicate_weights="",
    lora_scale=0.6,
    loras=(),
    lora_scales=(),
    hf_api_token=None,
    civitai_api_token=None,
    seed=1,
)
