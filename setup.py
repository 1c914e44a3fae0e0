from setuptools import setup

setup(
    name="zephyr",
    version="0.1.0",
    description="Zephyr-7B from scratch, in plain PyTorch: dSFT and dDPO of a hand-written Mistral",
    license="Apache-2.0",
    packages=["zephyr"],
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11,<2.14",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "numpy",
        "huggingface_hub",
        "tyro",
        "tqdm",
        "pyarrow",
        "jinja2",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "test": [
            "pytest",
            "hypothesis",
            "ruff",
            "transformers",
            "trl",
            "gguf",
            "mistral-common",
        ],
    },
)
