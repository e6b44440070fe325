"""Package metadata of minimind_o_hf; tool settings live in pyproject.toml.

The folders `modeling/` and `processing/` of the repository become `minimind_o_hf.modeling` and
`minimind_o_hf.processing` through `package_dir`, for editable and regular installs alike.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

# torchaudio ended at 2.11.0; its wheel loads beside torch 2.11 to 2.14 (all built for the same CUDA), not beside 2.15.
# `minimind_o_hf/environment.py` repeats the three in its error message, and a test compares them.
TORCH = "torch>=2.11,<2.15"
TORCHAUDIO = "torchaudio>=2.11,<2.12"
# torchvision pins its torch exactly, so pip picks the matching pair.
TORCHVISION = "torchvision>=0.26,<0.30"

# 34 MB of network and weights, and no dependencies. Its files are read in place, so a version that moves them is not
# taken by chance.
WATERMARK = "resemble-perth>=1.0.1,<1.1"

EXTRAS = {
    # The "any-to-any" pipeline insists on torchvision for models that take pictures.
    "pipeline": [TORCHVISION],
    # Adapters, pictures of training data, and logs.
    "train": ["peft>=0.17", "matplotlib>=3.8", "tensorboard>=2.15"],
    # `minimind-o talk` by microphone and loudspeaker, `minimind-o voices play`; without it, both use files.
    "play": ["sounddevice>=0.4.6"],
    # The inaudible watermark of generated sound, and its detector.
    "watermark": [WATERMARK],
    # `minimind-o evaluate`: error rates, plots, suites, and a recogniser with its model (38 MB).
    "evaluation": ["jiwer>=4", "matplotlib>=3.8", "pyyaml>=6", "pocketsphinx>=5", "evaluate>=0.4.5"],
    # `minimind-o export onnx`, and what its graphs run on.
    "onnx": ["onnx>=1.20", "onnxscript>=0.5", "onnxruntime>=1.23"],
    # Loading in 8 and 4 bits, on CPUs too.
    "quantization": ["torchao>=0.18"],
    # `minimind-o serve`: the page, OpenAI's protocols, and silero's voice activity detection with its model.
    "server": [
        "fastapi>=0.115",
        "starlette>=0.40",
        "pydantic>=2.9",
        "uvicorn>=0.34",
        "websockets>=14",
        "python-multipart>=0.0.18",
        "prometheus-client>=0.20",
        "silero-vad>=6.2",
        "onnxruntime>=1.23",
        "cryptography>=43",
        "qrcode>=8",
    ],
    # Linters are pinned: a new rule must not fail an old commit. pyright brings its own Node.js.
    "quality": ["ruff==0.17.5", "pyright[nodejs]==1.1.414", "pre-commit>=4"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "pytest-timeout>=2.3", "pytest-cov>=5", WATERMARK],
}
# The server is tested with the clients that people use: OpenAI's package and a browser (Chromium is not in the wheel).
EXTRAS["test"] += ["openai>=3", "playwright>=1.49", "httpx>=0.27", "psutil>=6", "soxr>=0.5"]
EXTRAS["test"] += EXTRAS["evaluation"] + EXTRAS["onnx"] + EXTRAS["quantization"] + EXTRAS["server"]
EXTRAS["dev"] = [requirement for extra in ("pipeline", "train", "quality", "test") for requirement in EXTRAS[extra]]

setup(
    name="minimind_o_hf",
    version="0.1.0",
    description="MiniMind-O for Hugging Face Transformers: text, speech and pictures in; text and speech out",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "minimind_o_hf",
        "minimind_o_hf.data",
        "minimind_o_hf.evaluation",
        "minimind_o_hf.modeling",
        "minimind_o_hf.processing",
        "minimind_o_hf.server",
    ],
    package_data={
        "minimind_o_hf": ["nano/**/*"],
        "minimind_o_hf.server": ["page/*"],
        "minimind_o_hf.evaluation": ["suites/*.json", "tables/*.yaml"],
    },
    package_dir={"minimind_o_hf.modeling": "modeling", "minimind_o_hf.processing": "processing"},
    install_requires=[
        # 5.24 renamed `past_key_values` to `cache` in every output and signature that this package extends.
        "transformers>=5.23,<5.24",
        TORCH,
        TORCHAUDIO,
        "accelerate>=1.1",
        "safetensors>=0.4.3",
        "huggingface_hub>=1.0",
        "tokenizers>=0.23.1",
        "jinja2>=3.1.6",
        "numpy>=1.26",
        "soundfile>=0.12.1",
        "pillow>=10",
        "datasets>=4",
        "pyarrow>=15",
        "tqdm>=4.60",
        "filelock>=3.10",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minimind-o=minimind_o_hf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
