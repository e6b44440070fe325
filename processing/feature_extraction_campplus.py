"""The front-end of CAM++: any recording becomes the 80 log-mel features at 10 ms that the speaker encoder reads."""

import torch
import torchaudio
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.generic import TensorType

from .audio_minimind_o import AudioSource, read_clips


class CamPlusPlusFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Constructs a CAM++ feature extractor: the logarithm of a Slaney mel power spectrogram, less its mean over time.

    Args:
        feature_size (`int`, *optional*, defaults to 80):
            Mel bins.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Rate in Hz at which features are computed.
        padding_value (`float`, *optional*, defaults to 0.0):
            What stands in frames of padding.
        n_fft (`int`, *optional*, defaults to 512), win_length (`int`, *optional*, defaults to 400), hop_length
        (`int`, *optional*, defaults to 160):
            Sizes of the Fourier transform, the Hann window and the step, in samples. Frames are centred.
        min_frequency (`float`, *optional*, defaults to 20.0), max_frequency (`float`, *optional*, defaults to 7600.0):
            Range of the mel bins in Hz.
        mel_floor (`float`, *optional*, defaults to 1e-10):
            Least value before the logarithm.
        kwargs:
            Arguments of [`~feature_extraction_sequence_utils.SequenceFeatureExtractor`].

    Example:

    ```python
    >>> from minimind_o_hf import CamPlusPlusFeatureExtractor

    >>> features = CamPlusPlusFeatureExtractor()("voice.mp3")
    >>> features.input_features.shape  # (1, frames, 80)
    ```
    """

    model_input_names = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        min_frequency: float = 20.0,
        max_frequency: float = 7600.0,
        mel_floor: float = 1e-10,
        **kwargs,
    ):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if mel_floor <= 0:
            raise ValueError(f"`mel_floor` must be above 0, got {mel_floor}")
        if not 0 <= min_frequency < max_frequency <= sampling_rate / 2:
            raise ValueError(
                f"`min_frequency` ({min_frequency}) must be under `max_frequency` ({max_frequency}), and that at most "
                f"half of `sampling_rate` ({sampling_rate})"
            )
        self.n_fft = n_fft
        self.win_length = win_length
        self.hop_length = hop_length
        self.min_frequency = min_frequency
        self.max_frequency = max_frequency
        self.mel_floor = mel_floor

    @property
    def min_samples(self) -> int:
        """Shortest clip in samples: the encoder needs 3 frames, and the first and last are completed by mirroring."""
        return max(2 * self.hop_length, self.n_fft // 2 + 1)

    def __call__(
        self,
        raw_speech: AudioSource | list[AudioSource],
        sampling_rate: float | None = None,
        return_tensors: str | TensorType | None = "pt",
        padding: bool | str = True,
        max_length: int | None = None,
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
            pad_to_multiple_of (`int`, *optional*):
                Rounds the number of frames up to a multiple.

        Returns:
            [`BatchFeature`] with `input_features` (`torch.FloatTensor` of shape `(clips, frames, 80)`) and
            `attention_mask` (`torch.LongTensor` of shape `(clips, frames)`), 1 at real frames. A clip of N samples
            has `1 + N // 160` frames.

        Raises:
            `ValueError`: no clip at all, a clip under `min_samples`, bad samples (naming the clip).
            `OSError`: a clip's file cannot be read.
        """
        spectrogram = torchaudio.transforms.MelSpectrogram(
            self.sampling_rate,
            n_fft=self.n_fft,
            win_length=self.win_length,
            hop_length=self.hop_length,
            f_min=self.min_frequency,
            f_max=self.max_frequency,
            n_mels=self.feature_size,
            norm="slaney",
            mel_scale="slaney",
        )
        features = []
        for index, waveform in read_clips(raw_speech, sampling_rate, self.sampling_rate):
            if len(waveform) < self.min_samples:
                raise ValueError(
                    f"audio clip {index} has {len(waveform)} samples at {self.sampling_rate} Hz; {self.min_samples} "
                    "is the least"
                )
            mel = spectrogram(waveform).clamp(min=self.mel_floor).log().T
            features.append(mel - mel.mean(dim=0))
        outputs = self.pad(
            BatchFeature({"input_features": features}),
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True,
            return_tensors=return_tensors,
        )
        if isinstance(outputs["attention_mask"], torch.Tensor):
            outputs["attention_mask"] = outputs["attention_mask"].long()
        return outputs


__all__ = ["CamPlusPlusFeatureExtractor"]
