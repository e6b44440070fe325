"""`/v1/chat/completions`: text, speech and pictures in, text and speech out, whole or streamed."""

import base64
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from transformers.generation.stopping_criteria import StopStringCriteria

from .engine import Answer, SinglePrompt
from .media import FORMATS, SoundEncoder, decode_base64, encode_whole, read_picture, read_speech
from .service import ApiError, Service, new_id, run_in_thread

router = APIRouter()


class AudioOut(BaseModel):
    """How answers are spoken."""

    voice: str | dict[str, str] | None = None
    format: str = "wav"


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that are read; others of OpenAI's that change nothing here are let pass."""

    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=1000)
    model: str | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOut | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None


def check_unsupported(fields: dict[str, Any], names: Sequence[str]) -> None:
    """Refuses what would change the answer, and cannot be done."""
    for name in names:
        if fields.get(name):
            raise ApiError(f"`{name}` is not supported by this model: leave it out.", param=name)


def _checked(text: str) -> str:
    """A text that tokenizers take: JSON can hold halves of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError("A text holds half of a surrogate pair: send whole characters.", param="content") from error
    return text


def content_parts(content: Any, service: Service) -> Any:
    """
    A message's content as the processor takes it. Nothing in it is taken for a path, and nothing is fetched.

    Args:
        content: A text, or a list of OpenAI's parts: `text`/`input_text`, `input_audio`, `image_url`/`input_image`.

    Returns:
        `str` or `list[dict]`, as `content` is.
    """
    if isinstance(content, str):
        return _checked(content)
    if not isinstance(content, list) or not content:
        raise ApiError("A message's content is a text or a list of parts.", param="content")
    settings, parts = service.settings, []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _checked(part["text"])})
        elif kind == "input_audio" and isinstance(part.get("input_audio"), dict):
            data = decode_base64(part["input_audio"].get("data"), settings.max_body)
            parts.append({"type": "audio", "audio": read_speech(data, settings.max_audio_seconds)})
        elif kind in ("image_url", "input_image"):
            url = part.get("image_url")
            picture = read_picture(url.get("url") if isinstance(url, dict) else url, settings)
            parts.append({"type": "image", "image": picture})
        else:
            raise ApiError(
                f"Parts of a message are text, input_audio and image_url, got {kind!r:.50}.", param="content"
            )
    return parts


def _messages(request: ChatRequest, service: Service) -> list[dict[str, Any]]:
    messages = []
    for message in request.messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "developer", "user", "assistant"):
            raise ApiError(f"A message is the system's, user's or assistant's, got the role {role!r:.50}.")
        audio = message.get("audio")
        if role == "assistant" and content is None and isinstance(audio, dict):
            content = service.said.get(str(audio.get("id")))
            if content is None:
                raise ApiError("That spoken answer is not known any more: send its transcript.", param="audio")
        parts = content_parts(content, service)
        if role != "user" and not isinstance(parts, str):
            if any(part["type"] != "text" for part in parts):
                raise ApiError(f"Only the user's messages can hold speech and pictures, not the {role}'s.")
            parts = "\n".join(part["text"] for part in parts)
        messages.append({"role": "system" if role == "developer" else role, "content": parts})
    if messages[-1]["role"] == "assistant":
        raise ApiError("The last message is the assistant's own: there is nothing to answer.", param="messages")
    return messages


def sampling(request: Any, service: Service) -> dict[str, Any]:
    """Settings of `generate` out of a request's."""
    settings: dict[str, Any] = {"seeds": None if request.seed is None else [request.seed % 2**63]}
    if request.temperature == 0:
        settings["do_sample"] = False
    elif request.temperature is not None:
        settings |= {"do_sample": True, "temperature": request.temperature}
    if request.top_p is not None:
        settings["top_p"] = request.top_p
    stops = [request.stop] if isinstance(request.stop, str) else request.stop
    if stops:
        if len(stops) > 4 or not all(0 < len(stop) <= 100 for stop in stops):
            raise ApiError("`stop` is at most 4 strings of 1 to 100 characters.", param="stop")
        settings["stopping_criteria"] = [StopStringCriteria(service.processor.tokenizer, stops)]
    return settings


def prepare(request: ChatRequest, service: Service) -> SinglePrompt:
    """The request as what the engine takes."""
    speaks = "audio" in (request.modalities or ())
    messages = _messages(request, service)
    return service.prompt(
        messages,
        service.voice(request.audio.voice if request.audio else None) if speaks else None,
        request.max_completion_tokens or request.max_tokens,
        generation_mode=None if speaks else "text",
        **sampling(request, service),
    )


def usage_of(answer: Answer) -> dict[str, Any]:
    """What an answer took: positions of the prompt, tokens of text, frames of speech."""
    output: Any = answer.output
    if output is None:
        return {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    text = output.sequences.shape[1] - output.prompt_length
    frames = 0 if output.audio_codes_mask is None else int(output.audio_codes_mask.sum())
    return {
        "prompt_tokens": output.prompt_length,
        "completion_tokens": text + frames,
        "total_tokens": output.prompt_length + text + frames,
        "completion_tokens_details": {"text_tokens": text, "audio_tokens": frames},
    }


def _finish_reason(answer: Answer) -> str:
    return "stop" if answer.is_complete else "length"


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request):
    """Answers a conversation."""
    service: Service = request.app.state.service
    check_unsupported(
        {**(body.model_extra or {}), "n": body.n not in (None, 1)},
        ("n", "tools", "functions", "logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "prediction"),
    )
    if ((body.model_extra or {}).get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise ApiError("`response_format` can be text alone.", param="response_format")
    speaks = "audio" in (body.modalities or ())
    if body.audio is not None and body.audio.format not in FORMATS:
        raise ApiError(f"The audio format must be one of {', '.join(FORMATS)}.", param="audio")
    # Reading speech and pictures takes a while: others are served meanwhile.
    pending = await run_in_thread(prepare, body, service)
    answer = service.submit(pending, client=request.client and request.client.host)
    about = {
        "id": new_id("chatcmpl"),
        "created": int(time.time()),
        "model": service.settings.model_name,
    }
    audio = body.audio or AudioOut()
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        chunks = _stream(service, answer, about, audio if speaks else None, with_usage)
        return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    text, sounds = "", []
    async for new, sound in service.events(answer):
        text += new
        sounds += [] if sound is None else [sound]
        if await request.is_disconnected():
            break
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if speaks:
        name, expires = service.remember_transcript(text)
        sound = torch.cat(sounds) if sounds else torch.zeros(0)
        voice = service.voice_name(audio.voice)
        data = encode_whole(sound, audio.format, service.sampling_rate, service.settings.model_name, voice)
        spoken = {"id": name, "data": base64.b64encode(data).decode(), "expires_at": expires, "transcript": text}
        message |= {"content": None, "audio": spoken}
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer), "logprobs": None}
    return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage_of(answer)})


async def _stream(
    service: Service, answer: Answer, about: dict[str, Any], audio: AudioOut | None, with_usage: bool
) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any] | None, finish: str | None = None, usage: dict | None = None) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
        data = {**about, "object": "chat.completion.chunk", "choices": choices}
        if with_usage:
            data["usage"] = usage
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

    encoder, spoken, text = None, "", ""
    first: dict[str, Any] = {"role": "assistant", "content": None if audio else ""}
    if audio is not None:
        model, voice = service.settings.model_name, service.voice_name(audio.voice)
        encoder = SoundEncoder(audio.format, service.sampling_rate, model, voice)
        spoken, expires = service.remember_transcript("")
        first["audio"] = {"id": spoken, "transcript": ""}
    try:
        yield chunk(first)
        async for new, sound in service.events(answer):
            text += new
            if new:
                yield chunk({"audio": {"transcript": new}} if audio else {"content": new})
            data = encoder.push(sound) if encoder is not None and sound is not None else b""
            if data:
                yield chunk({"audio": {"data": base64.b64encode(data).decode()}})
        if encoder is not None:
            if data := encoder.end():
                yield chunk({"audio": {"data": base64.b64encode(data).decode()}})
            service.said[spoken] = text
            yield chunk({"audio": {"expires_at": expires}})
        yield chunk({}, _finish_reason(answer))
        if with_usage:
            yield chunk(None, usage=usage_of(answer))
        yield b"data: [DONE]\n\n"
    except Exception as error:  # the status has been sent: the stream has to say it
        told = error if isinstance(error, ApiError) else ApiError("The answer failed.", 500, "server_error")
        if isinstance(error, ValueError):
            told = ApiError(str(error))
        yield f"data: {json.dumps({'error': told.body})}\n\n".encode()
    finally:
        answer.cancel()
        if encoder is not None:
            encoder.close()


__all__ = ["content_parts", "router", "usage_of"]
