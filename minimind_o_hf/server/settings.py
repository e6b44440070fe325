"""What a server is started with."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """
    Settings of a server, checked.

    Args:
        model_name (`str`): What the model is called.
        host (`str`), port (`int`): Where it listens.
        api_key (`str`, *optional*): What clients must show; needed where others than this machine can connect.
        host_names (tuple of `str`): Further names under which browsers may reach it.
        voice (`str`, *optional*): The voice where a client names none; the checkpoint's first by default.
        library (`Path`, *optional*): The file of cloned voices; the user's own by default.
        speaker_encoder (`str`, *optional*): What voices are cloned with, a directory or Hub id.
        max_answers (`int`): Answers that are made at the same time.
        max_waiting (`int`): Answers that wait; more are refused as busy.
        max_sessions (`int`): Open realtime sessions.
        max_body (`int`): Largest request or event in bytes.
        max_audio_seconds (`float`): Longest clip of speech.
        max_voice_seconds (`float`): Longest recording that a voice is cloned from.
        max_pixels (`int`): Largest picture.
        max_new_tokens (`int`, *optional*): Longest answer, in steps of 80 ms; the checkpoint's by default.
        max_positions (`int`): Memory of a conversation, see [`Conversation`].
        max_turns (`int`, *optional*): Earlier turns that a conversation remembers, see [`Conversation`].
        session_seconds, idle_seconds (`float`): How long a session may last, and be silent.
        requests_per_minute (`int`): Of each client; 0 for any number.
        watermark (`bool`): Whether speech gets the inaudible watermark.
    """

    model_name: str = "nano"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    host_names: tuple[str, ...] = ()
    voice: str | None = None
    library: Path | None = None
    speaker_encoder: str | None = None
    max_answers: int = 8
    max_waiting: int = 32
    max_sessions: int = 64
    max_body: int = 32 * 2**20
    max_audio_seconds: float = 60.0
    max_voice_seconds: float = 300.0
    max_pixels: int = 25_000_000
    max_new_tokens: int | None = None
    max_positions: int = 2048
    max_turns: int | None = None
    session_seconds: float = 3600.0
    idle_seconds: float = 300.0
    requests_per_minute: int = 600
    watermark: bool = False

    def __post_init__(self):
        if not 0 <= self.port <= 65535:
            raise ValueError(f"The port must lie between 0 and 65535, got {self.port}.")
        if self.api_key is not None and (len(self.api_key) < 8 or not self.api_key.isascii()):
            raise ValueError("An API key needs at least 8 characters, of ASCII: others could guess it.")
        if not self.is_local and not self.api_key:
            raise ValueError(
                f"On {self.host} other machines can connect: give an API key, or listen on 127.0.0.1 alone."
            )
        for name in ("max_answers", "max_sessions", "max_body", "max_pixels", "max_new_tokens", "max_positions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_waiting", "requests_per_minute"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        for name in ("max_audio_seconds", "max_voice_seconds", "session_seconds", "idle_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")

    @property
    def is_local(self) -> bool:
        """Whether this machine alone can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


__all__ = ["ServerSettings"]
