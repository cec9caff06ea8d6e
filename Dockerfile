# sat_lora on NVIDIA GPUs. CUDA comes with torch's wheels; the host has the driver and nvidia-container-toolkit.
#
#   docker build -t sat_lora .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" sat_lora doctor --train-data my_images --from_pretrained base
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" -p 8000:8000 -e SAT_LORA_API_KEY sat_lora \
#       serve --run runs/mine --host 0.0.0.0
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" --entrypoint deepspeed sat_lora \
#       /opt/sat_lora/finetune_demo/finetune_cogvlm.py --train-data my_images --from_pretrained base
#
# --ipc host: NCCL and the workers that read images share memory, and Docker's own 64 MiB of it are too few.
FROM python:3.11-slim-bookworm

# Triton and DeepSpeed call the system's compiler when they first meet a GPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# So that a base image without CUDA is given the GPUs.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1

WORKDIR /opt/sat_lora
COPY LICENSE README.md constraints.txt pyproject.toml setup.py ./
COPY sat_lora sat_lora
COPY finetune_demo finetune_demo
RUN python -m pip install -c constraints.txt '.[chat,demo,page,quant,serve]'

# What it writes into /work belongs to this user; --user "$(id -u):$(id -g)" makes it yours.
RUN useradd --create-home --uid 1000 sat && mkdir /work && chown sat /work /opt/sat_lora/finetune_demo
ENV HOME=/home/sat
USER sat
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["sat-lora"]
CMD ["--help"]
