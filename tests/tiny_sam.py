"""Prompted models of a few kilobytes, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    Sam3VideoConfig,
    Sam3VideoModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

KINDS = ("sam", "sam_hq", "sam2", "sam2_video", "sam3_tracker", "sam3_video")
SIDE = 64
"""Of the square that images are brought to."""

_DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
_PROMPTS = {"hidden_size": 32, "image_size": SIDE, "mask_input_channels": 16}
_VIT = {
    "hidden_size": 32,
    "output_channels": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "global_attn_indexes": [1],
    "window_size": 4,
    "num_pos_feats": 16,
    "mlp_dim": 64,
    "initializer_range": 0.1,
}
_HIERA = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "embed_dim_per_stage": [8, 16, 24, 32],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "blocks_per_stage": [1, 1, 2, 1],
        "window_size_per_stage": [8, 4, 4, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [32, 24, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 32,
}
_SAM3_VISION = {
    "model_type": "sam3_vision_model",
    "backbone_config": {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": SIDE,
    },
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 32,
}


def _net(kind: str) -> PreTrainedModel:
    if kind in ("sam", "sam_hq"):
        sam: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, int]]] = {
            "sam": (SamConfig, SamModel, {}),
            "sam_hq": (SamHQConfig, SamHQModel, {"vit_dim": 32}),
        }
        config, net, more = sam[kind]
        prompts = {**_PROMPTS, "patch_size": 8, "image_embedding_size": SIDE // 8}
        parts = {"vision_config": _VIT, "prompt_encoder_config": prompts, "mask_decoder_config": {**_DECODER, **more}}
        return net(config(**parts))
    if kind in ("sam2", "sam2_video"):
        parts = {"vision_config": _HIERA, "prompt_encoder_config": _PROMPTS, "mask_decoder_config": _DECODER}
        if kind == "sam2":
            return Sam2Model(Sam2Config(**parts))
        return Sam2VideoModel(Sam2VideoConfig(**parts, **_MEMORY))
    prompts = {**_PROMPTS, "patch_size": 8}
    parts = {"vision_config": _SAM3_VISION, "prompt_encoder_config": prompts, "mask_decoder_config": _DECODER}
    if kind == "sam3_tracker":
        return Sam3TrackerModel(Sam3TrackerConfig(**parts))
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_layers": 1}
    detector = {
        "vision_config": _SAM3_VISION,
        "text_config": {**text, "vocab_size": 64, "projection_dim": 32},
        "geometry_encoder_config": layers,
        "detr_encoder_config": layers,
        "detr_decoder_config": {**layers, "num_queries": 4},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }
    return Sam3VideoModel(Sam3VideoConfig(detector_config=detector, tracker_config={**parts, **_MEMORY}))


_MEMORY = {
    "image_size": SIDE,
    "memory_attention_hidden_size": 32,
    "memory_attention_num_layers": 1,
    "memory_attention_num_attention_heads": 1,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 8,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 32,
    "memory_fuser_num_layers": 1,
}


def write_tiny_sam(folder: Path, kind: str = "sam") -> None:
    """Writes a model as from_pretrained reads it; its masks are noise, its scores spread over 0 to 1.

    Args:
        folder: to write to.
        kind: one of KINDS.
    """
    torch.manual_seed(0)
    net = _net(kind)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and "positional_embedding" not in name:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        if "mlp" in name and name.endswith("proj_out.weight") and "transformer" not in name:
            parameter.data *= 30  # logits beyond 1
        if "iou_prediction_head.proj_out.bias" in name and kind in ("sam", "sam_hq"):
            parameter.data += 0.5  # no sigmoid there
    net.save_pretrained(folder)
    if kind == "sam3_video":  # transformers 5.23 doubles a prefix as it saves, which the hub's weights have once
        path = folder / "model.safetensors"
        doubled = "tracker_model.tracker_model."
        tensors = {name.replace(doubled, "tracker_model."): values for name, values in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
