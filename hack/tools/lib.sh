# shellcheck shell=bash
# What the build scripts under hack/ have in common; sourced, never run.

MICROVM_CACHE=${MICROVM_CACHE:-${HOME:?}/.cache/microvm}
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
SCRIPT=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")

# One locale, so that sorting and messages do not depend on the machine, and no surprise from a caller's Go settings.
export LC_ALL=C
unset GOFLAGS GOARCH GOOS

say() { printf '%s: %s\n' "${SCRIPT#"$REPO"/}" "$*" >&2; }

die() { say "$*"; exit 1; }

# packages NAME...: installs the Debian packages that are not there yet.
packages() {
	local package log missing=()
	for package; do
		[[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *' ok installed' ]] || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	[ "$(id -u)" = 0 ] || die "not root; first run: apt-get install ${missing[*]}"
	say "installing ${missing[*]}"
	log=$(mktemp)
	# A machine that never ran apt-get update has no package lists, an old one has stale ones: hence the second try.
	if ! apt_install "${missing[@]}" >"$log" 2>&1 && ! { apt_update && apt_install "${missing[@]}"; } >>"$log" 2>&1; then
		tail -n 20 "$log" >&2
		die "apt-get could not install ${missing[*]} (whole log: $log)"
	fi
	rm -f "$log"
}

apt_update() { apt-get -q -o DPkg::Lock::Timeout=300 update; }

apt_install() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "$@"
}

# download_deb NAME DIR: fetches a package's newest version and unpacks it below DIR, without installing it.
download_deb() {
	mkdir -p "$2"
	(
		cd "$2" || exit
		# _apt, apt's own download user, has no right to a directory below $HOME.
		apt-get -q -o APT::Sandbox::User=root download "$1" >/dev/null ||
			{ apt_update >/dev/null && apt-get -q -o APT::Sandbox::User=root download "$1" >/dev/null; } ||
			die "apt-get could not download $1"
		dpkg -x "$1"_*.deb .
		rm -f "$1"_*.deb
	) >&2
}

# lock FILE: from here to the script's end one run at a time; a second run waits, then finds the first one's results.
lock() {
	mkdir -p "$(dirname "$1")"
	exec 9>"$1"
	flock -n 9 || { say "another run is at work, waiting"; flock 9; }
}

# scratch: makes a directory that goes away when the script ends, as do its background jobs, and sets SCRATCH to it.
scratch() {
	SCRATCH=$(mktemp -d "${TMPDIR:-/var/tmp}/microvm-build.XXXXXX")
	trap 'jobs -p | xargs -r kill 2>/dev/null; rm -rf "$SCRATCH"' EXIT
}

# put FROM TO: puts a file in place by renaming, so that nobody sees half of it or "text file busy".
put() {
	mkdir -p "$(dirname "$2")"
	cp -f "$1" "$2.new.$$"
	mv -f "$2.new.$$" "$2"
}
