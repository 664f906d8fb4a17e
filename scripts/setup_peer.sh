#!/usr/bin/env bash
# Makes .venv-peer: TRL at one version, for `python -m benchmarks.peer_step` to measure against.
#
# It has an environment of its own because it must bring what it wants, not what this project pins. Torch is the version
# that .venv has, so that both sides of the comparison compute with the same kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
. scripts/venv.sh
VERSION=1.16.0
FOLDER=.venv-peer
TRANSFORMERS=$(sed -n 's/^models = .*"\(transformers[^"]*\)".*/\1/p' pyproject.toml)
STAMP=$FOLDER/.ready

need_python
WANTED=$(cat "$0" scripts/venv.sh <(printf '%s %s' "$TORCH" "$TRANSFORMERS") <("$PYTHON" --version) | cksum)
if [ -x $FOLDER/bin/python ] && [ "$(cat $STAMP 2>/dev/null)" = "$WANTED" ]; then
    exit 0
fi

echo "setup: $FOLDER with trl $VERSION, a few minutes the first time"
make_venv $FOLDER
# Without CUDA also where there is a GPU: both sides are compared on a CPU.
install_cpu_torch
pip install -qq "trl==$VERSION" "$TORCH" "$TRANSFORMERS"
$FOLDER/bin/python -c "from trl import DistillationTrainer" >/dev/null 2>&1 || {
    echo "setup: trl $VERSION is installed and cannot be imported: $FOLDER/bin/python -c 'from trl import DistillationTrainer' says why" >&2
    exit 1
}
printf '%s\n' "$WANTED" >$STAMP
