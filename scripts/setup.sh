#!/bin/sh
# Makes a machine ready: Deno from the npm package `deno`, and Mesa's Vulkan CPU driver from Debian where no GPU is found.
# Says what it does and does nothing twice. Needs root only where something has to be installed.
#
#   sh scripts/setup.sh
set -eu
cd "$(dirname "$0")/.."
deno_version=2.9.6
caller_path=$PATH
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}" # without one Mesa warns at every start
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

# Runs npm, or what is to run it, quietly. Newer npm runs a package's install script only where it is allowed; Deno's
# puts the program in its place.
npm_install() {
  "$@" install -g --no-fund --no-audit --ignore-scripts=false --allow-scripts=deno "deno@$deno_version" >/dev/null 2>&1 ||
    fail "npm could not install Deno: run \"$* install -g deno@$deno_version\" to see why"
}

# 1. Deno, where the next command finds it: npm's global folder, or else a folder of the user's own. An earlier run may
# have put it where the caller's shell does not look, so that is searched too.
global=$(npm prefix -g 2>/dev/null || true)
own="${HOME:-}/.local"
PATH="$PATH:${global:+$global/bin:}$own/bin"
if command -v deno >/dev/null 2>&1; then
  version=$(deno --version 2>/dev/null | head -n 1)
  [ -n "$version" ] || fail "$(command -v deno) does not run: run \"npm install -g deno@$deno_version\" to replace it"
  say "Deno is there: $version"
  number=${version#deno }
  major=${number%%.*}
  minor=${number#*.}
  if [ "$major" -lt 2 ] || { [ "$major" = 2 ] && [ "${minor%%.*}" -lt 9 ]; }; then
    fail "Deno ${number%% *} is too old, 2.9 or newer is wanted: run \"deno upgrade $deno_version\""
  fi
else
  command -v npm >/dev/null 2>&1 ||
    fail "there is neither Deno nor npm: install Node.js 20, which brings npm, and run \"sh scripts/setup.sh\" again"
  say "installing Deno $deno_version from npm"
  if [ -w "$global" ] || [ "$(id -u)" = 0 ]; then
    npm_install npm
  elif as_root true; then
    npm_install sudo npm
  else
    npm_install npm --prefix "$own"
  fi
  hash -r
  version=$(deno --version 2>&1) || fail "Deno was installed but does not run: $version"
  say "installed $(printf '%s' "$version" | head -n 1)"
fi

# 2. A WebGPU adapter: a GPU's own driver, or Mesa's driver that computes on the CPU. On Linux it has to be Vulkan's: many
# machines without a GPU have Mesa's OpenGL, with which WebGPU is content although it computes many times slower.
[ "$(uname)" != Linux ] || export DENO_WEBGPU_BACKEND="${DENO_WEBGPU_BACKEND:-vulkan}"
adapter() {
  deno eval --unstable-webgpu '
    const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
    if (adapter) console.log(adapter.info.description || adapter.info.vendor || "an adapter without a name");
  ' 2>/dev/null || true
}
found=$(adapter)
if [ -z "$found" ]; then
  install="apt-get update; apt-get install -y mesa-vulkan-drivers libvulkan1" # one source out of reach must not matter
  command -v apt-get >/dev/null 2>&1 ||
    fail "no WebGPU adapter was found: install a Vulkan driver, for a CPU Mesa's lavapipe, and run \"sh scripts/setup.sh\" again"
  by_hand="sh -c '$install'"
  [ "$(id -u)" = 0 ] || by_hand="sudo $by_hand"
  as_root true ||
    fail "no Vulkan driver was found and this user may not install one: run \"$by_hand\""
  say "no Vulkan driver was found: installing Mesa's for CPUs from Debian"
  as_root sh -c "export DEBIAN_FRONTEND=noninteractive; $install" >/dev/null 2>&1 ||
    fail "Mesa could not be installed: run \"$by_hand\" to see why"
  found=$(adapter)
  [ -n "$found" ] ||
    fail "Mesa is installed but there is still no Vulkan adapter: run \"vulkaninfo --summary\" of vulkan-tools to see why"
fi
say "WebGPU adapter: $found"

# 3. The npm packages, so that the first task starts at once. Offline, what is cached will do.
if deno install --quiet --frozen --entrypoint scripts/*.ts >/dev/null 2>&1; then
  say "packages are cached"
else
  say "packages could not be cached now: they are fetched when they are needed"
fi

# 4. Deno in a folder that the caller's shell does not search is of no use to its next command.
folder=$(dirname "$(command -v deno)")
case ":$caller_path:" in
  *":$folder:"*) say "ready" ;;
  *) fail "Deno is in $folder, which is not on your PATH: run \"export PATH=$folder:\$PATH\" and set up again" ;;
esac
