"""`minimind-o serve`."""

import argparse
import contextlib
import datetime
import ipaddress
import os
import secrets
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from transformers.utils.hub import cached_file

from minimind_o_hf.chat import load
from minimind_o_hf.files import new_file
from minimind_o_hf.packaged import default_checkpoint, speaker_encoder_of
from minimind_o_hf.processing.processing_minimind_o import VOICES_NAME
from minimind_o_hf.voices import Voice, VoiceLibrary, default_library

from .app import create_app
from .settings import ServerSettings

CERTIFICATE_DAYS = 365
ANY_ADDRESS = ("0.0.0.0", "::")


def own_addresses(host: str) -> list[str]:
    """Addresses under which other machines may reach this one."""
    if host not in ANY_ADDRESS:
        return [host]
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only asks which way packets would go
            found.append(probe.getsockname()[0])
        except OSError:
            pass  # no network
    return [*found, socket.gethostname()]


def make_certificate(folder: Path, names: list[str]) -> tuple[Path, Path]:
    """
    A certificate for this machine, signed by itself; the one in the folder where it still holds for these names.

    Args:
        folder (`Path`): Where it is kept, so that a phone has to be told once that it is trusted.
        names (list of `str`): Host names and addresses.

    Returns:
        `tuple`: its file and its key's, both PEM.
    """
    certificate, key_file = folder / "certificate.pem", folder / "key.pem"
    now = datetime.datetime.now(datetime.UTC)
    wanted = sorted({*names, "localhost", "127.0.0.1"})
    if certificate.is_file() and key_file.is_file():
        with contextlib.suppress(ValueError, x509.ExtensionNotFound):  # damaged, or another's
            old = x509.load_pem_x509_certificate(certificate.read_bytes())
            held = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if sorted(str(name.value) for name in held) == wanted and old.not_valid_after_utc > now:
                return certificate, key_file
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "MiniMind-O")])
    alternatives: list[x509.GeneralName] = []
    for name in wanted:
        try:
            alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternatives.append(x509.DNSName(name))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    with new_file(key_file) as partial:
        Path(partial).touch(mode=0o600)
        Path(partial).write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        Path(partial).chmod(0o600)
    with new_file(certificate) as partial:
        Path(partial).write_bytes(made.public_bytes(pem))
    return certificate, key_file


def settings_of(options: argparse.Namespace) -> ServerSettings:
    """The options as settings, checked."""
    key = options.api_key or os.environ.get("MINIMIND_O_API_KEY") or None
    if key is None and not ServerSettings(api_key="-" * 8, host=options.host).is_local:
        key = secrets.token_urlsafe(18)
    name = options.name or (Path(options.model).name if options.model else "nano")
    return ServerSettings(
        model_name=name,
        host=options.host,
        port=options.port,
        api_key=key,
        voice=options.voice,
        library=options.library,
        speaker_encoder=speaker_encoder_of(options.model),
        max_answers=options.max_answers,
        max_waiting=options.max_waiting,
        max_sessions=options.max_sessions,
        max_new_tokens=options.max_new_tokens,
        max_turns=options.max_turns,
        requests_per_minute=options.requests_per_minute,
        watermark=options.watermark,
    )


def _introduce(settings: ServerSettings, scheme: str) -> None:
    """Says where the server is; to other machines by a code for a phone's camera, too."""
    print(f"{scheme}://{'localhost' if settings.is_local else settings.host}:{settings.port}", file=sys.stderr)
    if settings.is_local:
        return
    # Behind `#`, the key stays in the browser.
    url = f"{scheme}://{own_addresses(settings.host)[0]}:{settings.port}/#key={settings.api_key}"
    print(f"API key: {settings.api_key}\nFrom another machine: {url}", file=sys.stderr)
    if scheme == "http":
        print("Browsers give the microphone to https alone: start with --https.", file=sys.stderr)
    import qrcode

    code = qrcode.QRCode(border=2)
    code.add_data(url)
    code.print_ascii(out=sys.stderr, invert=True)


def _described_voices(model: str | None) -> dict[str, Voice]:
    """The voices of a checkpoint with what its file says of them."""
    file = cached_file(model or default_checkpoint(), VOICES_NAME, _raise_exceptions_for_missing_entries=False)
    return VoiceLibrary(file).voices() if file else {}


def run(options: argparse.Namespace) -> None:
    """Runs `minimind-o serve` until it is stopped."""
    settings = settings_of(options)
    if (options.certificate is None) != (options.key is None):
        raise ValueError("--certificate and --key belong together.")
    if len(options.adapter) > 1:
        raise ValueError("A server has one adapter: give --adapter once.")
    # The model and the codec have a thread each, which more threads of PyTorch's would only get in the way of.
    torch.set_num_threads(options.threads or max(1, torch.get_num_threads() // 2))
    model, processor = load(options.model, options.device, options.dtype, options.adapter)
    app = create_app(model, processor, settings, _described_voices(options.model))
    certificate = key = None
    if options.certificate:
        certificate, key = options.certificate, options.key
    elif options.https:
        certificate, key = make_certificate(default_library().parent / "server", own_addresses(options.host))
    # Before a port is taken in the log: two servers would else seem to run.
    listener = _listen(settings)
    settings_port = listener.getsockname()[1]
    if settings_port != settings.port:
        settings = replace(settings, port=settings_port)
    _introduce(settings, "https" if certificate else "http")
    config = uvicorn.Config(
        app,
        log_level="warning",
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ws_max_size=settings.max_body,
        ws_max_queue=8,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    with listener:
        uvicorn.Server(config).run(sockets=[listener])


def _listen(settings: ServerSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}.") from error
    return listener


__all__ = ["make_certificate", "own_addresses", "run", "settings_of"]
