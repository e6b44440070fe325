"""CAM++, a densely connected time-delay network with context-aware masking: features in, one speaker embedding out.

After "CAM++: A Fast and Efficient Network for Speaker Verification Using Context-Aware Masking"
(https://huggingface.co/papers/2303.00332), with one addition: recordings of different lengths share a batch, and the
padding of the shorter ones changes nothing. Wherever frames look at each other (convolutions, averages), those past
the recording's end are 0 or not counted.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, torch_compilable_check

from .configuration_campplus import CamPlusPlusConfig


@dataclass
class CamPlusPlusOutput(ModelOutput):
    """
    Output of [`CamPlusPlusModel`].

    Args:
        embeddings (`torch.FloatTensor` of shape `(batch_size, embedding_size)`):
            One speaker embedding per recording. Its direction tells the speaker; it is not normalised.
    """

    embeddings: torch.FloatTensor | None = None


class CamPlusPlusFrames:
    """
    Which frames of a padded batch are real, and how many each segment holds.

    Args:
        lengths (`torch.LongTensor` of shape `(batch_size,)`): Number of real frames of each row.
        num_frames (`int`): Number of frames with the padding.
        dtype (`torch.dtype`): The dtype of what is masked.
        segment_length (`int`): Frames of a segment.
    """

    def __init__(self, lengths: torch.LongTensor, num_frames: int, dtype: torch.dtype, segment_length: int):
        lengths = lengths.view(-1, 1, 1)
        starts = torch.arange(0, num_frames, segment_length, device=lengths.device)
        self.mask = (torch.arange(num_frames, device=lengths.device) < lengths).to(dtype)  # (batch, 1, frames)
        self.lengths = lengths
        self.segment_length = segment_length
        # A segment of padding alone counts as 1 frame: a division by 0 would be NaN, which no mask can undo.
        self.segment_lengths = (lengths - starts).clamp(1, segment_length)  # (batch, 1, segments)

    def context(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mean of the recording plus mean of the segment, `(batch_size, channels, segments)`; the input is masked."""
        padding = -hidden_states.shape[-1] % self.segment_length
        segments = functional.pad(hidden_states, (0, padding)).unflatten(-1, (-1, self.segment_length))
        sums = segments.sum(dim=-1, dtype=torch.float32)
        means = sums.sum(dim=-1, keepdim=True) / self.lengths + sums / self.segment_lengths
        return means.to(hidden_states.dtype)

    def mean_and_deviation(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Mean and unbiased standard deviation over real frames, `(batch_size, 2 * channels, 1)`."""
        values = hidden_states.float()
        mean = (values * self.mask).sum(dim=-1, keepdim=True) / self.lengths
        variance = ((values - mean) * self.mask).square().sum(dim=-1, keepdim=True) / (self.lengths - 1)
        return torch.cat([mean, variance.sqrt()], dim=1).to(hidden_states.dtype)


class CamPlusPlusResidualBlock(nn.Module):
    """Two convolutions over mel bins and frames beside a shortcut; a `stride` of 2 halves the mel bins."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=(stride, 1), padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.Conv2d(channels, channels, 1, stride=(stride, 1), bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        hidden_states = self.norm1(self.conv1(hidden_states)).relu() * mask
        return (self.norm2(self.conv2(hidden_states)) + residual).relu() * mask


class CamPlusPlusFrontEnd(nn.Module):
    """Convolutions over mel bins and frames: an eighth of the bins, each with its channels, as many frames."""

    def __init__(self, config: CamPlusPlusConfig):
        super().__init__()
        channels = config.front_end_channels
        self.conv_in = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm_in = nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList([CamPlusPlusResidualBlock(channels, stride) for stride in (2, 1, 2, 1)])
        self.conv_out = nn.Conv2d(channels, channels, 3, stride=(2, 1), padding=1, bias=False)
        self.norm_out = nn.BatchNorm2d(channels)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(batch_size, mel_bins, frames)` and the mask `(batch_size, 1, frames)` to
        `(batch_size, channels * mel_bins // 8, frames)`."""
        mask = mask.unsqueeze(1)
        hidden_states = hidden_states.unsqueeze(1) * mask
        hidden_states = self.norm_in(self.conv_in(hidden_states)).relu() * mask
        for block in self.blocks:
            hidden_states = block(hidden_states, mask)
        hidden_states = self.norm_out(self.conv_out(hidden_states)).relu() * mask
        return hidden_states.flatten(1, 2)


class CamPlusPlusDenseLayer(nn.Module):
    """A dilated convolution whose output is gated by the recording's and the segment's average."""

    def __init__(self, config: CamPlusPlusConfig, channels: int, dilation: int):
        super().__init__()
        width = config.bottleneck_channels
        self.norm1 = nn.BatchNorm1d(channels)
        self.bottleneck = nn.Conv1d(channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(width)
        self.local = nn.Conv1d(width, config.growth_rate, 3, padding=dilation, dilation=dilation, bias=False)
        self.context_in = nn.Conv1d(width, width // 2, 1)
        self.context_out = nn.Conv1d(width // 2, config.growth_rate, 1)

    def forward(self, hidden_states: torch.Tensor, frames: CamPlusPlusFrames) -> torch.Tensor:
        hidden_states = self.bottleneck(self.norm1(hidden_states).relu())
        hidden_states = self.norm2(hidden_states).relu() * frames.mask
        # One gate a segment: it is the same for all of a segment's frames.
        gates = self.context_out(self.context_in(frames.context(hidden_states)).relu()).sigmoid()
        gates = gates.repeat_interleave(frames.segment_length, dim=-1)[..., : hidden_states.shape[-1]]
        return self.local(hidden_states) * gates


class CamPlusPlusBlock(nn.Module):
    """Dense layers, each reading what all before it gave, and a projection to half the channels."""

    def __init__(self, config: CamPlusPlusConfig, channels: int, num_layers: int, dilation: int):
        super().__init__()
        widths = [channels + config.growth_rate * index for index in range(num_layers + 1)]
        self.layers = nn.ModuleList([CamPlusPlusDenseLayer(config, width, dilation) for width in widths[:-1]])
        self.norm = nn.BatchNorm1d(widths[-1])
        self.transition = nn.Conv1d(widths[-1], widths[-1] // 2, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor, frames: CamPlusPlusFrames) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = torch.cat([hidden_states, layer(hidden_states, frames)], dim=1)
        return self.transition(self.norm(hidden_states).relu())


class CamPlusPlusPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading."""

    config_class = CamPlusPlusConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    # Counters that only training reads; released files leave them out.
    _keys_to_ignore_on_load_missing = [r"num_batches_tracked"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            init.kaiming_normal_(module.weight)


class CamPlusPlusModel(CamPlusPlusPreTrainedModel):
    """
    The CAM++ speaker encoder. `from_pretrained` gives it in evaluation mode, which it needs: in training mode the
    batch norms mix the recordings of a batch, and count the padding.

    Args:
        config ([`CamPlusPlusConfig`]): The configuration.

    Example:

    ```python
    >>> from transformers import AutoFeatureExtractor, AutoModel
    >>> import minimind_o_hf

    >>> feature_extractor = AutoFeatureExtractor.from_pretrained("campplus")
    >>> model = AutoModel.from_pretrained("campplus")
    >>> model(**feature_extractor("voice.wav")).embeddings.shape
    torch.Size([1, 192])
    ```
    """

    # One frame of the halved rate has no standard deviation.
    min_frames = 3

    def __init__(self, config: CamPlusPlusConfig):
        super().__init__(config)
        self.front_end = CamPlusPlusFrontEnd(config)
        channels = config.tdnn_channels
        self.tdnn = nn.Conv1d(
            config.front_end_channels * config.num_mel_bins // 8, channels, 5, stride=2, padding=2, bias=False
        )
        self.tdnn_norm = nn.BatchNorm1d(channels)
        self.blocks = nn.ModuleList()
        for num_layers, dilation in zip(config.block_layers, config.block_dilations, strict=True):
            self.blocks.append(CamPlusPlusBlock(config, channels, num_layers, dilation))
            channels = (channels + config.growth_rate * num_layers) // 2
        self.norm = nn.BatchNorm1d(channels)
        self.projection = nn.Conv1d(2 * channels, config.embedding_size, 1, bias=False)
        self.projection_norm = nn.BatchNorm1d(config.embedding_size, affine=False)
        self.post_init()

    def _lengths(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
        """Number of real frames of each row, after a look at what was passed."""
        num_bins = self.config.num_mel_bins
        if input_features.ndim != 3 or input_features.shape[-1] != num_bins:
            raise ValueError(
                f"`input_features` must have shape (batch_size, frames, {num_bins}), got "
                f"{tuple(input_features.shape)}."
            )
        batch_size, num_frames, _ = input_features.shape
        if attention_mask is None:
            lengths = torch.full((batch_size,), num_frames, device=input_features.device)
        else:
            if attention_mask.shape != (batch_size, num_frames):
                raise ValueError(
                    f"`attention_mask` must have shape ({batch_size}, {num_frames}) as `input_features`, got "
                    f"{tuple(attention_mask.shape)}."
                )
            is_real = attention_mask != 0
            lengths = is_real.sum(dim=1)
            torch_compilable_check(
                (is_real == (torch.arange(num_frames, device=lengths.device) < lengths[:, None])).all(),
                "`attention_mask` must be 1 at each row's first frames and 0 after them: pad on the right.",
            )
        torch_compilable_check(
            (lengths >= self.min_frames).all(),
            lambda: f"A recording must have at least {self.min_frames} feature frames, got {lengths.tolist()}.",
        )
        return lengths

    @can_return_tuple
    def forward(
        self,
        input_features: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CamPlusPlusOutput:
        r"""
        Args:
            input_features (`torch.FloatTensor` of shape `(batch_size, frames, num_mel_bins)`):
                Log-mel features every 10 ms, less their mean over time: what [`CamPlusPlusFeatureExtractor`] gives.
            attention_mask (`torch.Tensor` of shape `(batch_size, frames)`, *optional*):
                1 at real frames, 0 at padding, which stands on the right. All frames are real by default.
        """
        lengths = self._lengths(input_features, attention_mask)
        hidden_states = input_features.to(self.dtype).transpose(1, 2)
        dtype, segment_length = hidden_states.dtype, self.config.segment_length
        frames = CamPlusPlusFrames(lengths, hidden_states.shape[-1], dtype, segment_length)
        hidden_states = self.tdnn_norm(self.tdnn(self.front_end(hidden_states, frames.mask))).relu()
        frames = CamPlusPlusFrames((lengths + 1) // 2, hidden_states.shape[-1], dtype, segment_length)
        for block in self.blocks:
            hidden_states = block(hidden_states, frames)
        statistics = frames.mean_and_deviation(self.norm(hidden_states).relu())
        embeddings = self.projection_norm(self.projection(statistics)).squeeze(-1)
        return CamPlusPlusOutput(embeddings=embeddings)


__all__ = ["CamPlusPlusModel", "CamPlusPlusOutput", "CamPlusPlusPreTrainedModel"]
