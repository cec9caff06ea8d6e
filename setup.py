from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="sat_lora",
    version="0.1.0",
    description="LoRA fine-tuning of CogVLM on SwissArmyTransformer, DeepSpeed ZeRO and model parallelism",
    long_description=(Path(__file__).resolve().parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The sat_lora authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["LoRA", "CogVLM", "SwissArmyTransformer", "DeepSpeed", "fine-tuning", "vision-language model"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["sat_lora", "sat_lora.*"]),
    package_data={"sat_lora": ["py.typed"]},
    zip_safe=False,
    python_requires=">=3.10",
    install_requires=[
        "SwissArmyTransformer>=0.4.12,<0.5",
        "triton",  # imported by SAT, though not among its requirements
        "wandb",  # the same
        "torch>=2.6",
        "deepspeed>=0.16",
        "transformers>=4.40",
        "safetensors>=0.4.3",
        "webdataset>=0.2.86",
        "numpy>=1.26",
        "packaging",
        "pydantic>=2",
        "Pillow>=9.1",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "mypy>=1.15",
            "peft>=0.17",
            "captcha>=0.7",
            "ruff>=0.17",
        ],
        "demo": ["captcha>=0.7"],
        "mutants": ["coverage>=7.6"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
    },
    entry_points={"console_scripts": ["sat-lora = sat_lora.cli:script"]},
)
