"""A cache that outlives an answer. Between two turns the Talker's codes move, the reference voice to the new prompt's
end and the last answer's out of it, while the Thinker's text stays: each stack keeps what it can."""

from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache

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


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, a slot a row: each row's begin at position 0, with room behind them."""

    def __init__(self, like: torch.Tensor, num_slots: int):
        super().__init__()
        self.lazy_initialization(like.new_zeros(num_slots, like.shape[1], 0, like.shape[3]), like)
        self.rows = torch.zeros(0, dtype=torch.long)  # of the present step
        self.positions = self.rows
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states, key_states.clone()
        self.is_initialized = True

    def make_room(self, length: int) -> None:
        """For so many positions; what is there stays."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], length, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys[self.rows, :, self.positions] = key_states[:, :, 0]
        self.values[self.rows, :, self.positions] = value_states[:, :, 0]
        count = len(self.rows)
        return self.keys[:count, :, : self.length], self.values[:count, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return -1


class _SlotRow:
    """What one step after the other adds to a row of a [`MiniMindOSlotCache`], and where it goes in the end."""

    def __init__(self, cache: MiniMindOCache):
        self.cache = cache
        self.length = cache.get_seq_length()
        self.bridge: list[torch.Tensor] = []
        self.codes: list[torch.Tensor] = []


class MiniMindOSlotCache(MiniMindOCache):
    """
    Keys and values of rows that come and go between steps, each from a [`MiniMindOCache`] of its own and back into it.
    The rows of a step are the first slots, so that nothing is copied for it.

    Args:
        config ([`MiniMindOConfig`]): The model's configuration.
        num_slots (`int`): Most rows at a time.
    """

    def __init__(self, config: MiniMindOConfig, num_slots: int):
        super().__init__(config)
        self._num_slots = num_slots
        self._rows: list[_SlotRow] = []
        self._room = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def add(self, cache: MiniMindOCache) -> None:
        """
        Takes a row in, as the last one.

        Args:
            cache ([`MiniMindOCache`]): After the prompt, of one row. It is not to be used until `remove`.
        """
        if len(self._rows) == self._num_slots:
            raise ValueError(f"All {self._num_slots} slots are taken.")
        # The Talker's layers are there from the first row on that speaks.
        for own in cache.layers[len(self.layers) :]:
            self.layers.append(_SlotLayer(own.keys, self._num_slots))
            self.layers[-1].make_room(self._room)
        self._make_room(cache.get_seq_length() + 1)
        for layer, own in zip(self.layers, cache.layers, strict=False):
            length = own.get_seq_length()
            layer.keys[len(self._rows), :, :length] = own.keys[0]
            layer.values[len(self._rows), :, :length] = own.values[0]
        self._rows.append(_SlotRow(cache))

    def _make_room(self, length: int) -> None:
        if length > self._room:
            self._room = max(2 * self._room, length, 256)
            for layer in self.layers:
                layer.make_room(self._room)

    def begin_step(self) -> dict[str, torch.Tensor]:
        """
        Prepares one more position of each row.

        Returns:
            `position_ids` `(num_rows, 1)` and `attention_mask` `(num_rows, 1, 1, length)`, as the model takes them.
        """
        lengths = torch.tensor([row.length for row in self._rows])
        length = int(lengths.max()) + 1
        self._make_room(length)
        keys = self.layers[0].keys
        positions = lengths.to(keys.device)
        for layer in self.layers:
            layer.rows = torch.arange(len(lengths), device=keys.device)
            layer.positions, layer.length = positions, length
        is_hidden = torch.arange(length, device=keys.device) > positions[:, None]
        mask = keys.new_zeros(is_hidden.shape).masked_fill(is_hidden, torch.finfo(keys.dtype).min)
        for row in self._rows:
            row.length += 1
        return {"position_ids": positions[:, None], "attention_mask": mask[:, None, None]}

    def unread(self, bridge_hidden_state: torch.FloatTensor) -> torch.FloatTensor:
        """Keeps each row's state of this step."""
        for row, state in zip(self._rows, bridge_hidden_state.split(1), strict=True):
            row.bridge.append(state)
        return bridge_hidden_state

    def add_codes(self, audio_codes: torch.LongTensor, speaker_embeddings: torch.FloatTensor | None) -> None:
        """Keeps each row's codes of this step."""
        for row, codes in zip(self._rows, audio_codes.split(1), strict=True):
            row.codes.append(codes)

    def remove(self, index: int, with_talker: bool = True) -> None:
        """
        Gives a row's keys and values back to the cache that it came from. The last row takes its place.

        Args:
            index (`int`): Of the row.
            with_talker (`bool`): Whether the row spoke; the Talker's part stays as it was where it did not.
        """
        row = self._rows[index]
        cache = row.cache
        for layer_idx, (layer, own) in enumerate(zip(self.layers, cache.layers, strict=False)):
            if with_talker or layer_idx < self._first_talker_layer:
                own.keys = layer.keys[index : index + 1, :, : row.length].clone()
                own.values = layer.values[index : index + 1, :, : row.length].clone()
        # Copies: a view would keep the states of all rows of its step alive.
        cache._bridge += [torch.cat(row.bridge, dim=1)] if row.bridge else []
        if with_talker and row.codes:
            cache._codes.append(torch.cat(row.codes, dim=2))
        last = len(self._rows) - 1
        if index != last:
            length = self._rows[last].length
            for layer in self.layers:
                layer.keys[index, :, :length] = layer.keys[last, :, :length]
                layer.values[index, :, :length] = layer.values[last, :, :length]
            self._rows[index] = self._rows[last]
        self._rows.pop()
        # Hidden positions weigh nothing, but nothing times NaN is NaN: a broken row must not reach the next ones.
        for layer in self.layers:
            layer.keys[last].zero_()
            layer.values[last].zero_()


__all__ = ["MiniMindOCache", "MiniMindOSlotCache"]
