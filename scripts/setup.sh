#!/bin/sh
# Makes a machine ready: Deno from the npm package `deno`, and Mesa's Vulkan CPU driver from Debian where no GPU is found.
# Says what it does and does nothing twice. Needs root only where something has to be installed.
#
#   sh scripts/setup.sh
set -eu
cd "$(dirname "$0")/.."
deno_version=2.9.6
caller_path=$PATH
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"
export DENO_NO_UPDATE_CHECK=1

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'Cannot set up: %s\n' "$*" >&2
  exit 1
}

# Root runs a command as it is, others through sudo where it asks for no password.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    sudo "$@"
  else
    return 126
  fi
}

# 1. Deno, where the next command finds it: npm's global folder, or else a folder of the user's own that is on PATH.
if command -v deno >/dev/null 2>&1; then
  say "Deno is there: $(deno --version | head -n 1)"
else
  command -v npm >/dev/null 2>&1 || fail "there is neither Deno nor npm: install Node.js 20 first, which brings npm"
  say "installing Deno $deno_version from npm"
  if [ -w "$(npm prefix -g 2>/dev/null)" ] && npm install -g --no-fund --no-audit "deno@$deno_version" >/dev/null 2>&1; then
    :
  elif as_root npm install -g --no-fund --no-audit "deno@$deno_version" >/dev/null 2>&1; then
    :
  else
    own="$HOME/.local"
    npm install -g --no-fund --no-audit --prefix "$own" "deno@$deno_version" >/dev/null ||
      fail "npm could not install deno@$deno_version: run \"npm install -g deno@$deno_version\" to see why"
    PATH="$own/bin:$PATH"
  fi
  hash -r 2>/dev/null || true
  command -v deno >/dev/null 2>&1 || PATH="$(npm prefix -g)/bin:$PATH"
  deno --version >/dev/null || fail "Deno was installed but does not run: try \"npm install -g deno@$deno_version\" by hand"
  say "installed $(deno --version | head -n 1)"
fi

# 2. A WebGPU adapter: a GPU's own driver, or Mesa's driver that computes on the CPU.
adapter() {
  deno eval --unstable-webgpu \
    'const a = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" }); console.log(a?.info.description ?? "")' \
    2>/dev/null || true
}
found=$(adapter)
if [ -z "$found" ]; then
  install="apt-get update && apt-get install -y mesa-vulkan-drivers libvulkan1"
  command -v apt-get >/dev/null 2>&1 ||
    fail "no WebGPU adapter was found: install a Vulkan driver, for a CPU Mesa's lavapipe"
  say "no GPU was found: installing Mesa's Vulkan CPU driver from Debian"
  status=0
  as_root sh -c "$install" >/dev/null 2>&1 || status=$?
  [ "$status" != 126 ] || fail "no WebGPU adapter was found and this user may not install one: run \"sudo sh -c '$install'\""
  [ "$status" = 0 ] || fail "Mesa could not be installed: run \"$install\" to see why"
  found=$(adapter)
  [ -n "$found" ] || fail "Mesa is installed but there is still no WebGPU adapter: run \"deno task 01\" with DENO_LOG=debug"
fi
say "WebGPU adapter: $found"

# 3. The npm packages, so that the first task starts at once. Offline, what is cached will do.
if deno install --quiet --frozen --entrypoint scripts/*.ts >/dev/null 2>&1; then
  say "packages are cached"
else
  say "packages could not be cached now: they are fetched when they are needed"
fi

# 4. Deno in a folder that the caller's shell does not search is of no use to its next command.
case ":$caller_path:" in
  *":$(dirname "$(command -v deno)"):"*) say "ready" ;;
  *) fail "Deno is in $(dirname "$(command -v deno)"), which is not on your PATH: run \"export PATH=$(dirname "$(command -v deno)"):\$PATH\"" ;;
esac
