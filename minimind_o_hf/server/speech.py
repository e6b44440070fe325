"""`/v1/audio/speech`, texts read aloud; `/v1/audio/voices`, the voices to read them in."""

import asyncio
import base64
import datetime
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from minimind_o_hf.data.sources import reading_prompt
from minimind_o_hf.processing.voices_minimind_o import check_voice_name
from minimind_o_hf.voices import Voice

from .engine import SinglePrompt
from .media import FORMATS, LISTENING_RATE, SoundEncoder, read_speech
from .service import ApiError, Service, run_in_thread

router = APIRouter()

# Longer texts are read piece by piece: an answer of 512 steps lasts 40 s.
PIECE_CHARACTERS = 200
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|(?<=[。！？；])")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


class SpeechRequest(BaseModel):
    """OpenAI's fields."""

    model_config = ConfigDict(hide_input_in_errors=True)

    input: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    voice: str | dict[str, str] | None = None
    response_format: str = "mp3"
    stream_format: Literal["audio", "sse"] = "audio"
    speed: float = Field(default=1.0, ge=0.25, le=4)
    instructions: str | None = None
    seed: int | None = None


def pieces(text: str, longest: int = PIECE_CHARACTERS) -> list[str]:
    """A text in pieces to be read one after the other: whole sentences where they are short enough."""
    found: list[str] = []
    for sentence in filter(None, map(str.strip, SENTENCE_END.split(text))):
        while len(sentence) > longest:
            cut = sentence.rfind(" ", 1, longest) if " " in sentence[1:longest] else longest
            found.append(sentence[:cut].strip())
            sentence = sentence[cut:].strip()
        if found and len(found[-1]) + len(sentence) < longest and not SENTENCE_END.search(found[-1] + " "):
            found[-1] += f" {sentence}"
        elif sentence:
            found.append(sentence)
    return found


def _prompt(service: Service, text: str, voice: Any, body: SpeechRequest) -> SinglePrompt:
    prompt = reading_prompt(text, "zh" if CHINESE.search(text) else "en")
    messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
    seeds = None if body.seed is None else [body.seed % 2**63]
    return service.prompt([*messages, {"role": "user", "content": prompt}], voice, seeds=seeds)


@router.post("/v1/audio/speech")
async def speech(body: SpeechRequest, request: Request) -> StreamingResponse:
    """Reads a text aloud; the sound is sent from the first frame on."""
    service: Service = request.app.state.service
    if body.response_format not in FORMATS:
        raise ApiError(
            f"`response_format` must be one of {', '.join(FORMATS)}, got {body.response_format!r:.30}.",
            param="response_format",
        )
    if body.speed != 1:
        raise ApiError("Speech has one speed here: leave `speed` out.", param="speed")
    voice, texts = service.voice(body.voice), pieces(body.input)
    if not texts:
        raise ApiError("There is nothing to read: the text is empty.", param="input")
    prompts = [await run_in_thread(_prompt, service, text, voice, body) for text in texts]
    name = service.voice_name(body.voice)
    encoder = SoundEncoder(body.response_format, service.sampling_rate, service.settings.model_name, name)
    # The first is asked for here, so that a busy server can say so.
    client = request.client and request.client.host
    first = service.submit(prompts[0], client=client)
    sound = _sound(service, encoder, first, prompts[1:], client)
    headers = {"Cache-Control": "no-store"}
    if body.stream_format == "sse":
        return StreamingResponse(_as_events(sound), media_type="text/event-stream", headers=headers)
    return StreamingResponse(sound, media_type=encoder.content_type, headers=headers)


async def _sound(
    service: Service, encoder: SoundEncoder, answer: Any, later: list[SinglePrompt], client: str | None
) -> AsyncIterator:
    try:
        while True:
            async for _, samples in service.events(answer):
                if samples is not None and (data := encoder.push(samples)):
                    yield data
            if not later:
                break
            answer = service.submit(later.pop(0), client=client)
        if data := encoder.end():
            yield data
    finally:
        answer.cancel()
        encoder.close()


async def _as_events(sound: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for data in sound:
        event = {"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()}
        yield f"data: {json.dumps(event)}\n\n".encode()
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    yield f"data: {json.dumps({'type': 'speech.audio.done', 'usage': usage})}\n\n".encode()


# ---------------------------------------------------------------- voices


def _described(name: str, voice: Any, source: str, service: Service) -> dict[str, Any]:
    notes = voice.notes if isinstance(voice, Voice) else voice
    created = notes.get("created") or ""
    try:
        at = int(datetime.datetime.fromisoformat(created).timestamp())
    except (TypeError, ValueError):
        at = service.started
    told = {key: notes.get(key) or "" for key in ("language", "description", "licence")}
    about = {"id": name, "object": "audio.voice", "type": "audio_sample", "name": name}
    return {**about, "created_at": at, "source": source, **told}


@router.get("/v1/audio/voices")
async def list_voices(request: Request) -> dict[str, Any]:
    """All voices: the checkpoint's, and those that were cloned here."""
    service: Service = request.app.state.service
    voices = await run_in_thread(service.voices)
    data = [_described(name, voice, source, service) for name, (voice, source) in sorted(voices.items())]
    return {"object": "list", "data": data}


@router.post("/v1/audio/voices")
async def create_voice(
    request: Request,
    name: Annotated[str, Form(max_length=100)],
    consent: Annotated[str, Form(max_length=1000)],
    audio_sample: Annotated[UploadFile, File()],
    language: Annotated[str, Form(max_length=20)] = "",
    description: Annotated[str, Form(max_length=500)] = "",
    licence: Annotated[str, Form(max_length=200)] = "",
) -> JSONResponse:
    """Makes a voice of a recording, with the speaker's consent; of the recording itself nothing is kept."""
    service: Service = request.app.state.service
    if await run_in_thread(check_voice_name, name) in await run_in_thread(service.voices):
        raise ApiError(f"There is a voice {name!r} already: give another name.", 409, "voice_exists", "name")
    data = await audio_sample.read()
    encoder = service.settings.speaker_encoder

    def clone() -> Voice:
        waveform = read_speech(data, service.settings.max_voice_seconds)
        return Voice.from_audio(
            waveform,
            consent,
            processor=service.processor,
            speaker_encoder=encoder,
            sampling_rate=LISTENING_RATE,
            name=name,
            language=language,
            description=description,
            licence=licence,
        )

    async with service.cloning:  # it takes both cores
        voice = await run_in_thread(clone)
        try:
            await asyncio.to_thread(service.library.add, voice)
        except ValueError as error:  # another client was faster
            raise ApiError(f"There is a voice {name!r} already: give another name.", 409, "voice_exists") from error
    return JSONResponse(_described(name, voice, "library", service))


@router.delete("/v1/audio/voices/{name}")
async def delete_voice(name: str, request: Request) -> dict[str, Any]:
    """Removes a cloned voice."""
    service: Service = request.app.state.service
    voices = await run_in_thread(service.voices)
    if name not in voices:
        raise ApiError(f"There is no voice {name!r:.100}.", 404, "voice_not_found")
    if voices[name][1] != "library":
        raise ApiError(f"{name!r} belongs to the checkpoint and stays.", 403)
    try:
        await asyncio.to_thread(service.library.remove, name)
    except ValueError as error:  # another client was faster
        raise ApiError(f"There is no voice {name!r:.100}.", 404, "voice_not_found") from error
    return {"id": name, "object": "audio.voice.deleted", "deleted": True}


__all__ = ["pieces", "router"]
