#!/bin/sh
# Installs torch and the dependencies of the given extras into /opt/opd, in a layer that our code does not touch.
# Usage: install.sh http,models
set -eu
extras=$1
wheels=$(dirname "$0")
python=/opt/opd/bin/python
torch=$(sed -n 's/^models = \["\(torch==[0-9.]*\)".*/\1/p' pyproject.toml)

# A wheel that lies here wins; then the +cpu build, which uv knows where to find; then what pip is configured to find.
"$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" "$torch" 2>/dev/null \
    || UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=60 /opt/opd/bin/uv pip install --quiet --python "$python" \
        --torch-backend "${TORCH_BACKEND:-cpu}" "$torch" 2>/dev/null \
    || echo "install: the index of ${TORCH_BACKEND:-cpu} builds cannot be reached; taking $torch from where pip looks"
"$python" - "$extras" > /tmp/requirements.txt <<'PY'
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + [line for name in sys.argv[1].split(",") for line in extras[name]]))
PY
"$python" -m pip install --quiet --find-links "$wheels" -r /tmp/requirements.txt
