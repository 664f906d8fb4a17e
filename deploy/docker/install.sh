#!/bin/sh
# Installs one group of dependencies into /opt/opd, each in a layer of its own that our code does not touch, so that the
# images share what they have in common while they are built. Run in the folder that holds pyproject.toml.
#   install.sh core http     the project's own dependencies and those of the extra `http`
#   install.sh models        torch (see TORCH_BACKEND below) and the rest of the extra `models`
#   install.sh code          the packages that lie here, without dependencies; then leaves out what only developers need
# TORCH_BACKEND: cpu; cuda, the build on the package index; or a name that uv knows, such as cu128.
# ENGINE: transformers, or vllm, which needs a CUDA build and brings vllm==VLLM_VERSION.
set -eu
backend=${TORCH_BACKEND:-cpu}
target=/opt/opd/bin/python
site=$("$target" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

install() { python -m pip --python "$target" install --quiet --no-warn-script-location "$@"; }

requirements() {
    python - "$@" <<'PY'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print("\n".join(line for name in sys.argv[1:] for line in (project["dependencies"] if name == "core" else extras[name])))
PY
}

install_torch() {
    torch=$(requirements models | sed -n 's/^torch==//p')
    case $backend in
    cpu)
        # A wheel that lies in wheels/ wins; then the +cpu build, which uv knows where to find; then what pip finds.
        install --no-index --no-deps --find-links wheels "torch==$torch+cpu" 2>/dev/null \
            || from_backend "$torch" \
            || echo "install: the index of CPU builds cannot be reached; taking torch==$torch from where pip looks"
        ;;
    cuda) ;;
    *) from_backend "$torch" || { echo "install: TORCH_BACKEND=$backend: its index cannot be reached" >&2; exit 1; } ;;
    esac
}

from_backend() {
    python -m pip install --quiet --target /tmp/uv uv
    UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=60 /tmp/uv/bin/uv pip install --quiet --no-cache --python "$target" \
        --torch-backend "$backend" "torch==$1" 2>/dev/null
}

leave_out() {
    # The last layer takes what is here: tests of others, headers and link libraries for compiling against them.
    find "$site" -depth -type d \( -name tests -o -name test \) \
        \( -path '*/numpy/*' -o -path '*/pandas/*' -o -path '*/pyarrow/*' -o -path '*/torch/*' \
        -o -path '*/matplotlib/*' -o -path '*/sympy/*' -o -path '*/networkx/*' \) -exec rm -rf {} +
    rm -rf "$site"/pyarrow/include "$site"/pyarrow/*.a
    # CUDA engines compile kernels while they run; they keep torch's headers.
    [ "$backend" != cpu ] || rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/lib/*.a
    # pip's notes of where a file came from say nothing at run time.
    find "$site" -name direct_url.json -delete
}

case $1 in
code)
    install --no-deps .
    python -m pip --python "$target" check
    leave_out
    ;;
models)
    [ "${ENGINE:-transformers}" = transformers ] || [ "$backend" != cpu ] || {
        echo "install: ENGINE=vllm with TORCH_BACKEND=cpu: needs a CUDA build; set TORCH_BACKEND=cuda" >&2
        exit 1
    }
    install_torch
    requirements core http models > /tmp/requirements.txt
    [ "${ENGINE:-transformers}" != vllm ] || echo "vllm==$VLLM_VERSION" >> /tmp/requirements.txt
    install --find-links wheels -r /tmp/requirements.txt
    ;;
*)
    requirements "$@" > /tmp/requirements.txt
    install -r /tmp/requirements.txt
    ;;
esac
