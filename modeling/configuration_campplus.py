"""Configuration of CAM++, the network that turns a recording into the voice MiniMind-O speaks with."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.type_validators import positive_int_field


@strict
class CamPlusPlusConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CamPlusPlusModel`]. The defaults are those of the released speaker encoder (6.85 M
    parameters).

    Args:
        num_mel_bins (`int`, defaults to 80):
            Mel bins of a feature frame, a multiple of 8: the front end halves them three times.
        front_end_channels (`int`, defaults to 32):
            Channels of the front end's two-dimensional convolutions.
        tdnn_channels (`int`, defaults to 128):
            Channels of the convolution that halves the frame rate before the first block.
        block_layers (`list[int]`, defaults to `[12, 24, 16]`):
            Number of densely connected layers in each block. After each block its channels are halved.
        block_dilations (`list[int]`, defaults to `[1, 2, 2]`):
            Dilation of the local convolutions of each block, in frames of 20 ms.
        growth_rate (`int`, defaults to 32):
            Channels that each dense layer adds.
        bottleneck_channels (`int`, defaults to 128):
            Channels inside a dense layer, an even number.
        segment_length (`int`, defaults to 100):
            Frames (of 20 ms) of the segments over which a dense layer averages for its context.
        embedding_size (`int`, defaults to 192):
            Size of a speaker embedding.
    """

    model_type = "campplus"

    num_mel_bins: int = positive_int_field(default=80)
    front_end_channels: int = positive_int_field(default=32)
    tdnn_channels: int = positive_int_field(default=128)
    block_layers: list[int] | tuple[int, ...] = (12, 24, 16)
    block_dilations: list[int] | tuple[int, ...] = (1, 2, 2)
    growth_rate: int = positive_int_field(default=32)
    bottleneck_channels: int = positive_int_field(default=128)
    segment_length: int = positive_int_field(default=100)
    embedding_size: int = positive_int_field(default=192)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"The configuration does not fit: {error}") from error

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the fields that must fit each other."""
        if self.num_mel_bins % 8:
            raise ValueError(f"`num_mel_bins` ({self.num_mel_bins}) must be a multiple of 8.")
        if self.bottleneck_channels % 2:
            raise ValueError(f"`bottleneck_channels` ({self.bottleneck_channels}) must be even.")
        for name in ("block_layers", "block_dilations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must hold numbers of at least 1, got {list(getattr(self, name))}.")
        if len(self.block_layers) != len(self.block_dilations):
            raise ValueError(
                f"`block_layers` ({list(self.block_layers)}) and `block_dilations` ({list(self.block_dilations)}) "
                "must be of one length."
            )


__all__ = ["CamPlusPlusConfig"]
