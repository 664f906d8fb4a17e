#!/usr/bin/env bash
# Makes .venv with everything the project needs: no root, no GPU, no Redis on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=/dev/null
. scripts/venv.sh

need_python
make_venv .venv
# Torch comes first and by itself, so that nothing else decides which build it is.
if has_gpu; then
    pip install --quiet "$TORCH"
else
    install_cpu_torch
fi
pip install --quiet --editable ".[dev]"
