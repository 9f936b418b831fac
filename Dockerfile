# coreinfer-sim on a CPU: serves the OpenAI API on port 8000, unless another command is named behind the image.
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY coreinfer_sim coreinfer_sim
COPY cli cli
# The second index has torch without CUDA; its version sorts above that of the first.
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu '.[demo,serve]' \
    && COREINFER_SIM_CACHE=/opt/coreinfer-sim python -m coreinfer_sim_cli.demo_model \
    && rm -rf /src/* \
    && useradd --uid 1000 --create-home user \
    && install --directory --owner user /data

# What is built and compiled lies in a volume; the model of the ready-made index is part of the image.
ENV COREINFER_SIM_CACHE=/data/cache \
    COREINFER_SIM_MODELS=/data/models:/opt/coreinfer-sim/models \
    HF_HOME=/data/hub \
    NUMBA_CACHE_DIR=/data/cache/numba \
    XDG_CONFIG_HOME=/data/config \
    XDG_DATA_HOME=/data
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["coreinfer-sim"]
CMD ["serve", "--host", "0.0.0.0"]
