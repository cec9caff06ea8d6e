from setuptools import find_packages, setup

setup(
    name="sat_lora",
    version="0.1.0",
    description="LoRA fine-tuning of CogVLM on SwissArmyTransformer, DeepSpeed ZeRO and model parallelism",
    packages=find_packages(include=["sat_lora", "sat_lora.*"]),
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
        "Pillow>=9.1",
        "tqdm",
        "tensorboard",
        "matplotlib",
    ],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "peft>=0.17", "captcha>=0.7"],
        "demo": ["captcha>=0.7"],
    },
    entry_points={"console_scripts": ["sat-lora = sat_lora.cli:script"]},
)
