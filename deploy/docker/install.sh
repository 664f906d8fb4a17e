#!/bin/sh
# Installs one group of dependencies into /opt/opd, each in a layer of its own that our code does not touch, so that the
# images share what they have in common while they are built. Run in the folder that holds pyproject.toml.
#   install.sh core http     the project's own dependencies and those of the extra `http`
#   install.sh models EXTRA  torch (see TORCH_BACKEND below), the rest of the extra `models`, and the extra EXTRA
#   install.sh code MODULE.. the packages that lie here, and bytecode of all that MODULEs import: the root of a container
#                            is read-only, and a process that compiles its imports at every start takes seconds longer
# TORCH_BACKEND: cpu; cuda, the build on the package index; or a name that uv knows, such as cu128.
# ENGINE: transformers, or vllm, which needs a CUDA build and brings vllm==VLLM_VERSION.
# TARGET: the Python that gets all this; the one in /opt/opd.
set -eu
backend=${TORCH_BACKEND:-cpu}
engine=${ENGINE:-transformers}
target=${TARGET:-/opt/opd/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$("$target" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

install() { python -m pip --python "$target" install --quiet --no-compile --no-warn-script-location "$@"; }

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
    python -m pip install --quiet --target "$work/uv" uv
    UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=60 "$work/uv/bin/uv" pip install --quiet --no-cache --python "$target" \
        --torch-backend "$backend" "torch==$1" 2>/dev/null
}

leave_out() {
    # What only its developers use: tests of numpy, pandas and the like, headers and libraries to link against.
    for package in numpy pandas pyarrow matplotlib sympy networkx; do
        [ ! -d "$site/$package" ] || find "$site/$package" -depth -type d -name tests -exec rm -rf {} +
    done
    rm -rf "$site"/pyarrow/include "$site"/pyarrow/*.a
    # CUDA engines compile kernels while they run, with torch's headers.
    if [ "$backend" = cpu ] && [ -d "$site/torch" ]; then
        rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test "$site"/torch/lib/*.a
        find "$site/torch/bin" -type f ! -name torch_shm_manager -delete
    fi
}

compile_imports() {
    "$target" -m compileall -q "$site"/opd "$site"/services
    [ "$engine" != vllm ] || "$target" -m compileall -q "$site"/vllm
    # Importing writes the bytecode.
    for module in "$@"; do
        HOME=/tmp "$target" -c "import importlib, sys; importlib.import_module(sys.argv[1])" "$module"
    done
}

case $1 in
code)
    shift
    install --no-deps .
    python -m pip --python "$target" check
    compile_imports "$@"
    exit
    ;;
models)
    if [ "$engine" = vllm ] && [ "$backend" = cpu ]; then
        echo "install: ENGINE=vllm with TORCH_BACKEND=cpu: needs a CUDA build; set TORCH_BACKEND=cuda" >&2
        exit 1
    fi
    install_torch
    requirements core http "$@" > "$work/requirements.txt"
    [ "$engine" != vllm ] || echo "vllm==$VLLM_VERSION" >> "$work/requirements.txt"
    # Wheels that lie here are of CPU builds, and to pip 2.13.0+cpu is a better 2.13.0 than the one for CUDA.
    if [ "$backend" = cpu ]; then
        install --find-links wheels -r "$work/requirements.txt"
    else
        install -r "$work/requirements.txt"
    fi
    ;;
*)
    requirements "$@" > "$work/requirements.txt"
    install -r "$work/requirements.txt"
    ;;
esac
leave_out
