"""Mimi frame by frame: any chunking of codes gives the waveform of one call, and of sound the codes of one call.

`MimiModel.decode` starts every convolution from silence, so that sound decoded in pieces clicks where they join. Here
each layer's left context is kept: the inputs that a convolution still needs, the part of a transposed convolution's
output that the next inputs add to, and the keys and values of the attention's window. The layers are the codec's own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.models.mimi.modeling_mimi import (
    MimiConv1d,
    MimiConvTranspose1d,
    MimiModel,
    MimiResnetBlock,
    MimiTransformerModel,
)


@dataclass
class MimiStreamState:
    """
    What one side of the codec remembers of the frames so far, for every row of a batch. A value: a call takes one and
    returns another, and never changes the one it took.

    Args:
        positions (`torch.LongTensor` of shape `(batch_size,)`): Frames so far, at the transformer's rate. Rows need
            not have begun together.
        tensors (`dict[str, torch.Tensor]`): By layer; the first dimension is the batch. Zeros are a fresh start.
    """

    positions: torch.LongTensor
    tensors: dict[str, torch.Tensor]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.positions)

    def _rows(self, rows: Sequence[int] | torch.Tensor) -> torch.LongTensor:
        rows = torch.as_tensor(rows, device=self.positions.device)
        return rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()

    def select(self, rows: Sequence[int] | torch.Tensor) -> "MimiStreamState":
        """A state of these rows alone, in this order: their numbers, or a mask."""
        rows = self._rows(rows)
        return MimiStreamState(self.positions[rows], {name: value[rows] for name, value in self.tensors.items()})

    def replace(self, rows: Sequence[int] | torch.Tensor, state: "MimiStreamState") -> "MimiStreamState":
        """This state with other rows in the place of some: the other way round from `select`."""
        rows = self._rows(rows)
        if len(rows) != len(state):
            raise ValueError(f"{len(rows)} rows are to be replaced by a state of {len(state)}.")
        names = self.tensors.keys() | state.tensors.keys()
        tensors = {}
        for name in names:
            like = state.tensors.get(name, self.tensors.get(name))
            old = self.tensors.get(name, like.new_zeros(len(self), *like.shape[1:]))
            new = state.tensors.get(name, like.new_zeros(len(state), *like.shape[1:]))
            tensors[name] = old.index_copy(0, rows, new)
        return MimiStreamState(self.positions.index_copy(0, rows, state.positions), tensors)

    def reset(self, rows: Sequence[int] | torch.Tensor) -> "MimiStreamState":
        """This state with some rows at a fresh start."""
        rows = self._rows(rows)
        return MimiStreamState(
            self.positions.index_fill(0, rows, 0),
            {name: value.index_fill(0, rows, 0) for name, value in self.tensors.items()},
        )


class _Window:
    """What the attention layers take for a cache: the window's keys and values before the present ones."""

    def __init__(self, past: dict[str, torch.Tensor], prefix: str, size: int, new: dict[str, torch.Tensor]):
        self.past, self.prefix, self.size, self.new = past, prefix, size, new

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        joined = []
        for kind, states in (("keys", keys), ("values", values)):
            name = f"{self.prefix}.{layer_idx}.{kind}"
            before = self.past.get(name)
            if before is None:
                batch_size, heads, _, width = states.shape
                before = states.new_zeros(batch_size, heads, self.size, width)
            states = torch.cat([before, states], dim=2)
            window = states[:, :, states.shape[2] - self.size :]
            # Of a long chunk, the window alone is to stay alive.
            self.new[name] = window.clone() if states.shape[2] > 2 * self.size else window
            joined.append(states)
        return tuple(joined)


def _conv_transpose(
    inputs: torch.Tensor, conv: nn.ConvTranspose1d, tail: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A transposed convolution without bias whose kernel is two strides, as a matrix product: for the two inputs that a
    frame gives Mimi's first, PyTorch's own takes 47 ms of a core, and this 2.5.

    Returns:
        The outputs, `(batch_size, channels, length * stride)`, and what the last input adds to the next ones.
    """
    stride = conv.stride[0]
    batch_size, _, length = inputs.shape
    parts = inputs.transpose(1, 2) @ conv.weight.flatten(1)
    parts = parts.view(batch_size, length, conv.out_channels, 2, stride).transpose(1, 2)
    now, later = parts.unbind(3)
    outputs = now.contiguous()
    outputs[:, :, 1:] += later[:, :, :-1]
    if tail is not None:
        outputs[:, :, 0] += tail
    return outputs.flatten(2), later[:, :, -1].clone()


class _MimiStream:
    """One side of the codec as a function of its input and a state."""

    def __init__(self, codec: MimiModel):
        self.codec = codec

    def initial_state(self, batch_size: int) -> MimiStreamState:
        """The state of rows that have not begun."""
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        return MimiStreamState(torch.zeros(batch_size, dtype=torch.long, device=self.codec.device), {})

    def _convolve(self, layer: MimiConv1d, name: str, inputs: torch.Tensor, state: MimiStreamState, new: dict):
        if not layer.causal or layer.pad_mode not in ("constant", "replicate"):
            raise ValueError(
                "Only causal convolutions padded with zeros or their first input can be streamed, got pad_mode "
                f"{layer.pad_mode!r} (causal: {layer.causal})."
            )
        padding = layer.conv.dilation[0] * (layer.conv.kernel_size[0] - 1) + 1 - layer.conv.stride[0]
        if padding > 0:
            context = state.tensors.get(name)
            if context is None:
                context = inputs.new_zeros(*inputs.shape[:2], padding)
            if layer.pad_mode == "replicate":
                context = torch.where((state.positions == 0).view(-1, 1, 1), inputs[..., :1], context)
            inputs = torch.cat([context, inputs], dim=-1)
            # A copy: a view would keep the whole chunk alive.
            new[name] = inputs[..., inputs.shape[-1] - padding :].clone()
        return layer.conv(inputs)

    def _convolve_transposed(
        self, layer: MimiConvTranspose1d, name: str, inputs: torch.Tensor, state: MimiStreamState, new: dict
    ):
        conv = layer.conv
        if layer.padding_left:
            raise ValueError(
                "Transposed convolutions that look ahead (`trim_right_ratio` under 1) cannot be streamed."
            )
        tail = state.tensors.get(name)
        if conv.groups == 1 and conv.kernel_size[0] == 2 * conv.stride[0]:
            outputs, new[name] = _conv_transpose(inputs, conv, tail)
        else:
            length = inputs.shape[-1] * conv.stride[0]
            outputs = functional.conv_transpose1d(inputs, conv.weight, None, conv.stride, groups=conv.groups)
            if tail is not None:
                outputs[..., : tail.shape[-1]] += tail
            outputs, new[name] = outputs[..., :length], outputs[..., length:].clone()
        # The bias once for each output, not once for each input that adds to it.
        return outputs if conv.bias is None else outputs.add_(conv.bias.unsqueeze(-1))

    def _run(
        self, layers: Iterable[nn.Module], prefix: str, hidden_states: torch.Tensor, state: MimiStreamState, new: dict
    ) -> torch.Tensor:
        is_own = False  # whether `hidden_states` were made here, and may be overwritten
        for index, layer in enumerate(layers):
            name = f"{prefix}.{index}"
            if isinstance(layer, MimiConv1d):
                hidden_states = self._convolve(layer, name, hidden_states, state, new)
            elif isinstance(layer, MimiConvTranspose1d):
                hidden_states = self._convolve_transposed(layer, name, hidden_states, state, new)
            elif isinstance(layer, MimiResnetBlock):
                residual = self._run([layer.shortcut], f"{name}.shortcut", hidden_states, state, new)
                hidden_states = self._run(layer.block, f"{name}.block", hidden_states, state, new).add_(residual)
            elif isinstance(layer, nn.ELU):
                hidden_states = functional.elu(hidden_states, layer.alpha, inplace=is_own)
            else:  # another activation, or a shortcut that is none
                hidden_states = layer(hidden_states)
                continue
            is_own = True
        return hidden_states

    def _attend(
        self, model: MimiTransformerModel, hidden_states: torch.Tensor, state: MimiStreamState, new: dict
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """`(batch_size, channels, frames)` through the transformer; and the positions after it."""
        window, length = model.config.sliding_window, hidden_states.shape[-1]
        hidden_states = hidden_states.transpose(1, 2)
        queries = state.positions[:, None] + torch.arange(length, device=hidden_states.device)
        keys = state.positions[:, None] + torch.arange(1 - window, length, device=hidden_states.device)
        distance = queries[:, :, None] - keys[:, None]
        is_seen = (keys >= 0)[:, None] & (distance >= 0) & (distance < window)
        mask = torch.zeros(is_seen.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        mask = mask.masked_fill(~is_seen, torch.finfo(mask.dtype).min).unsqueeze(1)
        cache = _Window(state.tensors, "attention", window - 1, new)
        position_embeddings = model.rotary_emb(hidden_states, queries)
        for layer in model.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                past_key_values=cache,
                position_embeddings=position_embeddings,
            )
        return hidden_states.transpose(1, 2), state.positions + length

    def _check(self, name: str, inputs: torch.Tensor, dimensions: int, state: MimiStreamState | None):
        if inputs.dim() != dimensions or 0 in inputs.shape:
            raise ValueError(
                f"`{name}` must have {dimensions} dimensions and no empty one, got {tuple(inputs.shape)}."
            )
        if state is not None and len(state) != len(inputs):
            raise ValueError(f"`{name}` has {len(inputs)} rows, the state {len(state)}.")


class MimiStreamingDecoder(_MimiStream):
    """
    Decodes codes in chunks. The joined chunks equal one call for all codes, wherever they are cut.

    Args:
        codec ([`MimiModel`]): The codec, with its decoder. It is used as it is, on its device and in its dtype.

    Example:

    ```python
    >>> decoder = MimiStreamingDecoder(codec)
    >>> state = decoder.initial_state(batch_size=1)
    >>> for frame in codes.split(1, dim=2):
    ...     waveform, state = decoder(frame, state)  # (1, 1920)
    ```
    """

    @torch.no_grad()
    def __call__(
        self, codes: torch.LongTensor, state: MimiStreamState | None = None
    ) -> tuple[torch.FloatTensor, MimiStreamState]:
        """
        Args:
            codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`):
                The next frames, from 0 to `codebook_size - 1`.
            state ([`MimiStreamState`], *optional*): Where each row stands; a fresh start by default.

        Returns:
            The next samples, `(batch_size, num_frames * samples a frame)` (1,920 at Mimi's sizes), and the state after
            them.

        Raises:
            ValueError: Codes of another shape, too many codebooks or codes outside them; a state of other rows.
        """
        self._check("codes", codes, 3, state)
        size = self.codec.config.codebook_size
        if codes.is_floating_point() or codes.min() < 0 or codes.max() >= size:
            raise ValueError(
                f"`codes` must be integers from 0 to {size - 1}, got {codes.dtype} from {codes.min()} to "
                f"{codes.max()}. Drop stops and other special codes first."
            )
        if codes.shape[1] > self.codec.config.num_quantizers:
            raise ValueError(f"`codes` have {codes.shape[1]} codebooks, the codec {self.codec.config.num_quantizers}.")
        return self.step(codes.long(), self.initial_state(len(codes)) if state is None else state)

    def step(self, codes: torch.LongTensor, state: MimiStreamState) -> tuple[torch.FloatTensor, MimiStreamState]:
        """What a call does, without its checks of values, which a traced graph cannot hold."""
        new: dict[str, torch.Tensor] = {}
        decoder = self.codec.decoder
        hidden_states = self.codec.quantizer.decode(codes)
        if decoder.upsample is not None:
            hidden_states = self._run([decoder.upsample], "upsample", hidden_states, state, new)
        hidden_states, positions = self._attend(decoder.decoder_transformer, hidden_states, state, new)
        hidden_states = self._run(decoder.decoder_seanet.layers, "seanet", hidden_states, state, new)
        return hidden_states.squeeze(1), MimiStreamState(positions, new)


class MimiStreamingEncoder(_MimiStream):
    """
    Encodes sound in chunks of whole frames. The joined codes equal those of one call.

    Args:
        codec ([`MimiModel`]): The codec, with its encoder.
        num_codebooks (`int`, *optional*): How many codebooks; all by default.
    """

    def __init__(self, codec: MimiModel, num_codebooks: int | None = None):
        super().__init__(codec)
        self.num_codebooks = num_codebooks

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return round(self.codec.config.sampling_rate / self.codec.config.frame_rate)

    @torch.no_grad()
    def __call__(
        self, waveform: torch.FloatTensor, state: MimiStreamState | None = None
    ) -> tuple[torch.LongTensor, MimiStreamState]:
        """
        Args:
            waveform (`torch.FloatTensor` of shape `(batch_size, num_samples)`):
                The next samples, whole frames of them (1,920 at Mimi's sizes).
            state ([`MimiStreamState`], *optional*): Where each row stands; a fresh start by default.

        Returns:
            The next codes, `(batch_size, num_codebooks, num_frames)`, and the state after them.

        Raises:
            ValueError: Samples of another shape or of a part of a frame, integers or not finite; a state of other
                rows.
        """
        self._check("waveform", waveform, 2, state)
        if not waveform.is_floating_point() or not torch.isfinite(waveform).all():
            raise ValueError(
                f"`waveform` must hold finite floats in [-1, 1], got {waveform.dtype}: divide integers by their "
                "range, and look for NaN and infinity."
            )
        if waveform.shape[1] % self.frame_size:
            raise ValueError(
                f"`waveform` must hold whole frames of {self.frame_size} samples, got {waveform.shape[1]}: keep the "
                "rest for the next call, or fill the last frame up with zeros."
            )
        state = self.initial_state(len(waveform)) if state is None else state
        new: dict[str, torch.Tensor] = {}
        encoder = self.codec.encoder
        hidden_states = waveform.to(self.codec.device, self.codec.dtype).unsqueeze(1)
        hidden_states = self._run(encoder.encoder_seanet.layers, "seanet", hidden_states, state, new)
        hidden_states, positions = self._attend(encoder.encoder_transformer, hidden_states, state, new)
        if encoder.downsample is not None:
            hidden_states = self._run([encoder.downsample], "downsample", hidden_states, state, new)
        codes = self.codec.quantizer.encode(hidden_states, self.num_codebooks).transpose(0, 1)
        return codes, MimiStreamState(positions, new)


__all__ = ["MimiStreamState", "MimiStreamingDecoder", "MimiStreamingEncoder"]
