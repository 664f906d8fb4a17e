#!/usr/bin/env bash
# Lints the schema, and refuses a change that breaks what was released (proto/released); with --renew the schema as it is
# becomes the released one, which is part of making a release.
#
# Takes buf from PATH, else from npm into .buf/. Without either it says so, and under CI=true that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=1.75.0
SCHEMA=opd/v1/teacher.proto

if [ "${1:-}" = --renew ]; then
    install -D -m 644 "proto/$SCHEMA" "proto/released/$SCHEMA"
    exit
fi

give_up() {
    echo "check_proto: $1; the schema was not checked" >&2
    [ "${CI:-}" = true ] && exit 1 || exit 0
}

BUF=$(command -v buf || true)
if [ -z "$BUF" ]; then
    BUF=.buf/node_modules/.bin/buf
    if [ "$("$BUF" --version 2>/dev/null || true)" != "$VERSION" ]; then
        command -v npm >/dev/null || give_up "neither buf nor npm on PATH; install one of them"
        # No scripts: the binary comes in a package of its own.
        npm install --prefix .buf --no-save --no-package-lock --no-audit --no-fund --ignore-scripts --silent \
            "@bufbuild/buf@$VERSION" || give_up "npm could not install @bufbuild/buf@$VERSION"
    fi
fi
"$BUF" lint proto
# Copied out of the way: what lies within a module cannot be an input of its own.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r proto/released/. "$work"
"$BUF" breaking proto --against "$work"
