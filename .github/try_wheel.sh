#!/bin/sh
# The first minutes of a new user with the built wheel: a fresh environment, no checkout in sight.
#   sh .github/try_wheel.sh PYTHON [options of pip for torch]
set -eu
python=$1
shift
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build
"$work/build/bin/python" -m build --outdir "$work/dist" "$root"

"$python" -m venv "$work/fresh"
"$work/fresh/bin/pip" install --quiet --disable-pip-version-check ${TORCH_VERSION:-torch} "$@"
torch=$(du -sm "$work/fresh" | cut -f1)
"$work/fresh/bin/pip" install --quiet --disable-pip-version-check "$work"/dist/*.whl
"$work/fresh/bin/pip" check
echo "torch alone $torch MB, with slimgpt $(du -sm "$work/fresh" | cut -f1) MB"

cd "$work"
PATH="$work/fresh/bin:$PATH"
test "slimgpt $(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")" = "$(slimgpt --version)"
slimgpt --help > /dev/null
slimgpt families qwen3
slimgpt prune demo slim --ratio 0.2 --num-samples 16 --seq-len 256
slimgpt compare demo slim --max-tokens 2048 --prompt 64 --new-tokens 16 --rounds 1 --samples 1
slimgpt generate slim "Why is the sky blue?" --max-new-tokens 32
slimgpt export slim slim.gguf --to gguf --quantize Q8_0
test -s slimgpt-compare/report.html
echo "the wheel works"
