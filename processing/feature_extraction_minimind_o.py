"""SenseVoice's speech front-end: any recording becomes the 560 features at 60 ms that the speech encoder reads."""

import math

import numpy as np
import torch
import torchaudio
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.fun_asr_nano.feature_extraction_fun_asr_nano import FunAsrNanoFeatureExtractor
from transformers.utils.generic import TensorType

from .audio_minimind_o import AudioSource, read_clips

INT16_SCALE = 32768.0  # FunASR computes its filter bank on samples in the range of 16-bit integers


class MiniMindOFeatureExtractor(FunAsrNanoFeatureExtractor):
    r"""
    Constructs a MiniMind-O feature extractor: Kaldi filter banks (80 bins, 25 ms windows every 10 ms) of samples in
    the 16-bit range, 7 of them stacked every 6, then mean and variance normalisation. It adds to Fun-ASR-Nano's the
    scale, the normalisation, resampling, clips under one window, and checks.

    Args:
        cmvn_shift (`list[float]`, *optional*):
            Added to the stacked features: 560 values, the negated means of an `am.mvn` file.
        cmvn_scale (`list[float]`, *optional*):
            Multiplied onto the shifted features: 560 values, the inverse standard deviations of an `am.mvn` file.
            Comes with `cmvn_shift` or not at all.
        dither (`float`, *optional*, defaults to 0.0):
            Standard deviation of the Gaussian noise added to the samples, in units of the 16-bit range; 0 adds none.
            FunASR's default of 1.0 keeps digital silence inside the encoder's training distribution.
        dither_seed (`int`, *optional*, defaults to 0):
            Seed of that noise. It is drawn anew for each clip, so a clip's features do not depend on its batch.
        max_frames (`int`, *optional*, defaults to 2048):
            Longest clip in stacked frames, the size of the encoder's position table (122 s).
        kwargs:
            Arguments of [`FunAsrNanoFeatureExtractor`].

    Example:

    ```python
    >>> from minimind_o_hf import MiniMindOFeatureExtractor

    >>> features = MiniMindOFeatureExtractor()("question.mp3")
    >>> features.input_features.shape  # (1, frames, 560)
    ```
    """

    def __init__(
        self,
        cmvn_shift: list[float] | None = None,
        cmvn_scale: list[float] | None = None,
        dither: float = 0.0,
        dither_seed: int = 0,
        max_frames: int = 2048,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if dither < 0:
            raise ValueError(f"`dither` must be at least 0, got {dither}")
        if (cmvn_shift is None) != (cmvn_scale is None):
            raise ValueError("`cmvn_shift` and `cmvn_scale` come together: pass both or neither")
        self.cmvn_shift = self._check_cmvn("cmvn_shift", cmvn_shift)
        self.cmvn_scale = self._check_cmvn("cmvn_scale", cmvn_scale)
        self.dither = dither
        self.dither_seed = dither_seed
        self.max_frames = max_frames

    def _check_cmvn(self, name: str, values) -> list[float] | None:
        if values is None:
            return None
        values = np.asarray(values, dtype=np.float32)
        expected = self.feature_size * self.num_frames_lfr
        if values.shape != (expected,) or not np.isfinite(values).all():
            raise ValueError(f"`{name}` must hold {expected} finite values, got shape {values.shape}")
        return values.tolist()

    def num_frames(self, num_samples: int) -> int:
        """Number of feature frames, and so of placeholders, for `num_samples` samples at `sampling_rate`."""
        window = self.sampling_rate * self.frame_length // 1000
        hop = self.sampling_rate * self.frame_shift // 1000
        return math.ceil((1 + max(0, num_samples - window) // hop) / self.stride_lfr)

    def _extract_fbank_features(self, waveform: torch.Tensor) -> torch.Tensor:
        """Filter banks `(num_frames, feature_size)` of one waveform `(num_samples,)` in [-1, 1]."""
        waveform = waveform * INT16_SCALE
        if self.dither:
            generator = torch.Generator().manual_seed(self.dither_seed)
            waveform = waveform + self.dither * torch.randn(waveform.shape, generator=generator)
        # A clip under one window is its own window; the half sample keeps the division from rounding below it.
        clip_length = (len(waveform) + 0.5) * 1000 / self.sampling_rate
        return torchaudio.compliance.kaldi.fbank(
            waveform.unsqueeze(0),
            num_mel_bins=self.feature_size,
            frame_length=min(self.frame_length, clip_length),
            frame_shift=self.frame_shift,
            sample_frequency=self.sampling_rate,
            window_type=self.window,
        )

    def __call__(
        self,
        raw_speech: AudioSource | list[AudioSource],
        sampling_rate: float | None = None,
        return_tensors: str | TensorType | None = "pt",
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """
        Compute the features of one clip or of a batch.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, `list`):
                One clip, or a list of clips of any length. A clip is anything `load_audio` reads: samples of shape
                `(num_samples,)` or with up to 8 channels, a path, a URL, or a file's bytes.
            sampling_rate (`float`, *optional*):
                Rate in Hz of clips passed as arrays; the extractor's own where omitted. Other rates are resampled.
            return_tensors (`str` or [`~utils.TensorType`], *optional*, defaults to `"pt"`):
                Framework of the returned arrays.
            padding (`bool` or `str`, *optional*, defaults to `True`):
                As in [`~feature_extraction_sequence_utils.SequenceFeatureExtractor.pad`]; always on the right.
            max_length (`int`, *optional*):
                Frames to pad to with `padding="max_length"`.
            truncation (`bool`, *optional*, defaults to `False`):
                Must be False: a clip whose end is missing would no longer match its placeholders.
            pad_to_multiple_of (`int`, *optional*):
                Rounds the number of frames up to a multiple.

        Returns:
            [`BatchFeature`] with `input_features` (`torch.FloatTensor` of shape `(clips, frames, 560)`) and
            `input_features_mask` (`torch.LongTensor` of shape `(clips, frames)`), 1 at real frames.

        Raises:
            `ValueError`: no clip at all, a clip under 2 samples or above `max_frames`, bad samples (naming the clip).
            `OSError`: a clip's file cannot be read.
        """
        if truncation:
            raise ValueError("`truncation` is not supported: cut the recording into shorter clips")
        clips = read_clips(raw_speech, sampling_rate, self.sampling_rate)
        features = [self._clip_features(waveform, index) for index, waveform in clips]
        outputs = self.pad(
            BatchFeature({"input_features": features}),
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        mask = outputs.pop("attention_mask")
        if isinstance(mask, torch.Tensor):
            mask = mask.long()
        outputs["input_features_mask"] = mask
        return outputs

    def _clip_features(self, waveform: torch.Tensor, index: int) -> torch.Tensor:
        """Features `(frames, 560)` of clip number `index` of its batch."""
        if len(waveform) < 2:
            raise ValueError(
                f"audio clip {index} has {len(waveform)} sample at {self.sampling_rate} Hz; 2 is the least"
            )
        frames = self.num_frames(len(waveform))
        if frames > self.max_frames:
            limit = self.max_frames * self.stride_lfr * self.frame_shift / 1000
            raise ValueError(
                f"audio clip {index} lasts {len(waveform) / self.sampling_rate:.1f} s, {frames} frames: the speech "
                f"encoder takes at most {self.max_frames} ({int(limit)} s). Cut the recording into shorter clips."
            )
        features = self._apply_lfr(self._extract_fbank_features(waveform))
        if self.cmvn_shift is not None and self.cmvn_scale is not None:
            features = (features + torch.tensor(self.cmvn_shift)) * torch.tensor(self.cmvn_scale)
        return features


__all__ = ["MiniMindOFeatureExtractor"]
