"""A cache that outlives an answer. Between two turns the Talker's codes move, the reference voice to the new prompt's
end and the last answer's out of it, while the Thinker's text stays: each stack keeps what it can."""

from collections.abc import Callable

import torch
from transformers.cache_utils import DynamicCache

from .configuration_minimind_o import MiniMindOConfig


class MiniMindOCache(DynamicCache):
    """
    Keys and values of both stacks, and what it takes to run the Talker alone over positions that the Thinker has read:
    the Thinker's states at the bridge. Pass it to `generate` with the whole prompt, turn after turn: only what is new
    to a stack runs through it. The caller crops it to the part that the prompts share.

    Args:
        config ([`MiniMindOConfig`]): The model's configuration.
    """

    def __init__(self, config: MiniMindOConfig):
        super().__init__()
        self._first_talker_layer = config.num_hidden_layers
        self._speaker_code = config.audio_spk_token
        # Lists of pieces: a step would copy all of a tensor to add to it.
        self._bridge: list[torch.Tensor] = []
        self._codes: list[torch.Tensor] = []
        self._speaker_embeddings: torch.Tensor | None = None

    @property
    def talker_length(self) -> int:
        """Positions that the Talker has read: at most those of the Thinker, `get_seq_length()`."""
        return self.get_seq_length(self._first_talker_layer)

    @property
    def bridge_hidden_states(self) -> torch.FloatTensor | None:
        """`(batch_size, get_seq_length(), hidden_size)`: the Thinker's states after its bridge layer."""
        self._bridge = [torch.cat(self._bridge, dim=1)] if len(self._bridge) > 1 else self._bridge
        return self._bridge[0] if self._bridge else None

    @property
    def audio_codes(self) -> torch.LongTensor | None:
        """`(batch_size, num_codebooks, talker_length)`: the codes that the Talker has read."""
        self._codes = [torch.cat(self._codes, dim=2)] if len(self._codes) > 1 else self._codes
        return self._codes[0] if self._codes else None

    def unread(self, bridge_hidden_state: torch.FloatTensor) -> torch.FloatTensor:
        """Adds the Thinker's new states, and returns all that the Talker has not read."""
        self._bridge.append(bridge_hidden_state)
        length = self.get_seq_length() - self.talker_length
        if length == bridge_hidden_state.shape[1]:
            return bridge_hidden_state
        return self.bridge_hidden_states[:, self.talker_length :]

    def add_codes(self, audio_codes: torch.LongTensor, speaker_embeddings: torch.FloatTensor | None) -> None:
        """Remembers what the Talker has just read."""
        self._codes.append(audio_codes)
        if speaker_embeddings is not None:
            self._speaker_embeddings = speaker_embeddings

    def keep_codes(self, audio_codes: torch.LongTensor, speaker_embeddings: torch.FloatTensor | None) -> None:
        """
        Takes back what the Talker has read from the first position on where it would now read something else.

        Args:
            audio_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, prompt_length)`): The new prompt's.
            speaker_embeddings (`torch.FloatTensor` of shape `(batch_size, spk_emb_size)`, *optional*): Its voices.
        """
        read = self.audio_codes
        if read is None:
            return
        length = min(read.shape[2], audio_codes.shape[2])
        differs = (read[..., :length] != audio_codes[..., :length].to(read.device)).any(dim=1)
        before, after = self._speaker_embeddings, speaker_embeddings
        if before is not None or after is not None:
            before = torch.zeros_like(after) if before is None else before
            after = torch.zeros_like(before) if after is None else after.to(before.device)
            has_changed = (before != after).any(dim=-1, keepdim=True)
            differs |= has_changed & (read[:, 0, :length] == self._speaker_code)
        self._speaker_embeddings = speaker_embeddings
        kept = int((~differs.any(dim=0)).long().cumprod(dim=0).sum())
        self.crop_to(self.get_seq_length(), kept)

    def crop_to(self, length: int, talker_length: int | None = None) -> None:
        """
        Keeps a stack's first positions.

        Args:
            length (`int`): Of the Thinker.
            talker_length (`int`, *optional*): Of the Talker; as many where it has read them.
        """
        talker_length = min(self.talker_length, length if talker_length is None else talker_length)
        for layer_idx, layer in enumerate(self.layers):
            kept = length if layer_idx < self._first_talker_layer else talker_length
            layer.crop(min(kept - layer.get_seq_length(), 0))
        if self._bridge:
            self._bridge = [self.bridge_hidden_states[:, :length]]
        if self._codes:
            self._codes = [self.audio_codes[..., :talker_length]]

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last positions; `tokens_to_remove` is at most 0, as in [`DynamicCache`]."""
        self.crop_to(self.get_seq_length() + tokens_to_remove)

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self._bridge, self._codes, self._speaker_embeddings = [], [], None

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._bridge = [change(piece) for piece in self._bridge]
        self._codes = [change(piece) for piece in self._codes]
        if self._speaker_embeddings is not None:
            self._speaker_embeddings = change(self._speaker_embeddings)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As [`DynamicCache`]."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As [`DynamicCache`]."""
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])


__all__ = ["MiniMindOCache"]
