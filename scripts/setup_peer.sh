#!/usr/bin/env bash
# Makes .venv-peer: TRL at one version, for `python -m benchmarks.peer_step` to measure against.
#
# It has an environment of its own because it must bring what it wants, not what this project pins. Torch is the version
# that .venv has, so that both sides of the comparison compute with the same kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VERSION=1.16.0
VENV=.venv-peer
TORCH=$(sed -n 's/^models = \["\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
TRANSFORMERS=$(sed -n 's/^models = .*"\(transformers[^"]*\)".*/\1/p' pyproject.toml)
STAMP=$VENV/.ready
export PIP_DISABLE_PIP_VERSION_CHECK=1

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$PYTHON" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
    exit 2
}
WANTED=$(cat "$0" <(printf '%s %s' "$TORCH" "$TRANSFORMERS") <("$PYTHON" --version) | cksum)
if [ -x $VENV/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$WANTED" ]; then
    exit 0
fi

echo "setup: $VENV with trl $VERSION, a few minutes the first time"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
pip() { $VENV/bin/python -m pip "$@"; }
pip install -qq "pip>=24" uv
# The build without CUDA where its index can be reached; else what pip gives, which works as well and is larger.
if ! $VENV/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${TORCH#torch==}')" 2>/dev/null; then
    UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=30 $VENV/bin/uv pip install -qq --python $VENV/bin/python \
        --torch-backend cpu "$TORCH" 2>/dev/null || pip install -qq "$TORCH"
fi
pip install -qq "trl==$VERSION" "$TORCH" "$TRANSFORMERS"
$VENV/bin/python -c "from trl import DistillationTrainer" >/dev/null 2>&1 || {
    echo "setup: trl $VERSION is installed and cannot be imported: $VENV/bin/python -c 'from trl import DistillationTrainer' says why" >&2
    exit 1
}
printf '%s\n' "$WANTED" >$STAMP
