# shellcheck shell=bash
# What the scripts that make virtual environments have in common; they source it in the repository's root.
#
# TORCH is the version that pyproject.toml names. Where there is no GPU its `+cpu` build is wanted, since the plain one
# pulls gigabytes of CUDA packages; `uv --torch-backend` knows where that build lives. When its index cannot be reached,
# pip takes what it is configured to find.
PYTHON=${PYTHON:-python3}
TORCH=$(sed -n 's/^models = \["\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
export PIP_DISABLE_PIP_VERSION_CHECK=1

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

pip() { "$VENV/bin/python" -m pip "$@"; }

need_python() {
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "setup: $("$PYTHON" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
        exit 2
    }
}

# make_venv FOLDER: sets VENV; what is there already stays.
make_venv() {
    VENV=$1
    [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
    pip install -qq "pip>=24" uv
}

# The build without CUDA, unless torch of this version is there.
install_cpu_torch() {
    "$VENV/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${TORCH#torch==}')" \
        2>/dev/null && return
    UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=30 "$VENV/bin/uv" pip install -qq --python "$VENV/bin/python" \
        --torch-backend cpu "$TORCH" 2>/dev/null || {
        echo "setup: the index of CPU builds cannot be reached; taking $TORCH from where pip looks"
        pip install -qq "$TORCH"
    }
}
