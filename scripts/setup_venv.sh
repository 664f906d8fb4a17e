#!/usr/bin/env bash
# Makes .venv with everything the project needs: no root, no GPU, no Redis on the machine.
#
# torch comes first and by itself. Where there is no GPU the `+cpu` build is wanted, since the plain one pulls
# gigabytes of CUDA packages; `uv --torch-backend` knows where that build lives. When its index cannot be reached,
# pip takes what it is configured to find.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=$(sed -n 's/^models = \["\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$PYTHON" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check "pip>=24" uv

if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${TORCH#torch==}')" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        .venv/bin/python -m pip install --quiet "$TORCH"
    else
        UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=30 .venv/bin/uv pip install --quiet --python .venv/bin/python \
            --torch-backend cpu "$TORCH" 2>/dev/null || {
            echo "setup: the index of CPU builds cannot be reached; taking $TORCH from where pip looks"
            .venv/bin/python -m pip install --quiet "$TORCH"
        }
    fi
fi
.venv/bin/python -m pip install --quiet --editable ".[dev]"
