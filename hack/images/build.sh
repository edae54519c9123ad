#!/bin/bash
# Makes the container images of the tests from Debian packages, without a registry, as docker-archives:
#   $MICROVM_CACHE/images/busybox.tar   docker.io/microvm/busybox:latest    Debian's busybox-static
#   $MICROVM_CACHE/images/debian.tar    docker.io/microvm/debian:bookworm   a small Debian with python3, redis and fio
# usage: hack/images/build.sh [busybox|debian]...      (default: both)
# An image is made again only when this directory has changed.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"

HERE=$REPO/hack/images
IMAGES=$MICROVM_CACHE/images
# Dates in the images: the same everywhere, so that the same packages give the same bytes.
export SOURCE_DATE_EPOCH=1700000000

DEBIAN_PACKAGES=python3-minimal,redis-server,redis-tools,ca-certificates,e2fsprogs,procps,iproute2,attr,acl,fio

# wrap NAME REFERENCE CMD: makes NAME.tar of the root file system in $SCRATCH/NAME-root.tar.
wrap() {
	(
		cd "$HERE"
		CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$SCRATCH/images" .
	)
	"$SCRATCH/images" -name "$2" -layer "$SCRATCH/$1-root.tar" -cmd "$3" -o "$SCRATCH/$1.tar"
}

make_busybox() {
	local root=$SCRATCH/busybox applet
	download_deb busybox-static "$SCRATCH/deb"
	mkdir -p "$root"/{bin,dev,etc,home,proc,root,sbin,sys,tmp,usr/bin,usr/sbin,var/log,var/run}
	chmod 1777 "$root/tmp"
	cp "$SCRATCH/deb/bin/busybox" "$root/bin/busybox"
	# Hard links, so that a container can mask one applet without masking all.
	"$root/bin/busybox" --list | while read -r applet; do
		[ "$applet" = busybox ] || ln "$root/bin/busybox" "$root/bin/$applet"
	done
	ln -s ../../bin/env "$root/usr/bin/env"
	cat >"$root/etc/passwd" <<-'X'
		root:x:0:0:root:/root:/bin/sh
		daemon:x:1:1:daemon:/usr/sbin:/bin/false
		www-data:x:33:33:www-data:/var/www:/bin/false
		nobody:x:65534:65534:nobody:/home:/bin/false
	X
	printf '%s\n' root:x:0: daemon:x:1: tty:x:5: www-data:x:33: nogroup:x:65534: >"$root/etc/group"
	tar --owner=0 --group=0 --numeric-owner --sort=name --mtime=@$SOURCE_DATE_EPOCH -C "$root" \
		-cf "$SCRATCH/busybox-root.tar" .
	wrap busybox docker.io/microvm/busybox:latest sh
}

# debian_sources: the mirrors this machine's apt uses for Debian 12, as lines of a sources.list.
debian_sources() {
	# shellcheck disable=SC2016 # apt expands these
	apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
		sort -u | grep ' bookworm'
}

make_debian() {
	packages mmdebstrap
	local sources=$SCRATCH/sources.list log=$SCRATCH/mmdebstrap.log
	debian_sources >"$sources" || { apt_update >"$log" 2>&1 && debian_sources >"$sources"; } ||
		die "apt has no mirror with the package lists of Debian 12 (bookworm)"
	apt-config dump | grep -E '^Acquire::https?::Proxy' >"$SCRATCH/apt.conf" || true
	# shellcheck disable=SC2016 # $1 is the hook's
	mmdebstrap --mode=root --variant=minbase --include=$DEBIAN_PACKAGES --aptopt="$SCRATCH/apt.conf" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--customize-hook='rm -rf "$1"/etc/apt/sources.list* "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/hostname "$1"/etc/resolv.conf' \
		bookworm "$SCRATCH/debian-root.tar" "$sources" >"$log" 2>&1 ||
		{ tail -n 30 "$log" >&2; die "mmdebstrap failed"; }
	wrap debian docker.io/microvm/debian:bookworm bash
}

KEY=$(cat "$HERE/build.sh" "$HERE/main.go" "$HERE/go.mod" | sha256sum | cut -c 1-20)

present() { [ -e "$IMAGES/$1.tar" ] && [ "$(cat "$IMAGES/$1.key" 2>/dev/null)" = "$KEY" ]; }

scratch
[ $# -gt 0 ] || set -- busybox debian
for name; do
	case $name in busybox | debian) ;; *) die "unknown image $name" ;; esac
	present "$name" || lock "$IMAGES/lock"
	if ! present "$name"; then
		start=$SECONDS
		say "making $name"
		rm -f "$IMAGES/$name.key"
		"make_$name"
		put "$SCRATCH/$name.tar" "$IMAGES/$name.tar"
		echo "$KEY" >"$IMAGES/$name.key"
		say "$name made in $((SECONDS - start)) s"
	fi
	say "$IMAGES/$name.tar: $(stat -c %s "$IMAGES/$name.tar") bytes"
done
