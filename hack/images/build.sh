#!/bin/bash
# Makes the container images of the tests from Debian packages, without a registry, as docker-archives:
#   $MICROVM_CACHE/images/busybox.tar   docker.io/microvm/busybox:latest    Debian's busybox-static
#   $MICROVM_CACHE/images/debian.tar    docker.io/microvm/debian:bookworm   a small Debian with python3, redis, fio and iperf3
#   $MICROVM_CACHE/images/pause.tar     docker.io/microvm/pause:latest      the first process of a pod under CRI
#   $MICROVM_CACHE/images/box.tar       docker.io/microvm/box:latest        busybox from Debian's source, upstream's defaults
#   $MICROVM_CACHE/images/web.tar       docker.io/microvm/web:latest        Debian's nginx on it
#   $MICROVM_CACHE/images/programs.tar  docker.io/microvm/programs:bookworm a Debian with nginx, postgres, redis, python3 and wrk
# and $MICROVM_CACHE/images/layers, of which the registry for critest and Kubernetes' own tests makes its images.
# usage: hack/images/build.sh [busybox|debian|pods|programs|conformance]...
#        (default: busybox debian; pods is box, pause, web and layers, conformance a further layer)
# An image is made again only when what it is made of has changed.
set -euo pipefail
# shellcheck source=../tools/lib.sh
. "$(dirname "$0")/../tools/lib.sh"

HERE=$REPO/hack/images
IMAGES=$MICROVM_CACHE/images
# Dates in the images: the same everywhere, so that the same packages give the same bytes.
export SOURCE_DATE_EPOCH=1700000000

DEBIAN_PACKAGES=python3-minimal,redis-server,redis-tools,ca-certificates,e2fsprogs,procps,iproute2,attr,acl,fio,iperf3
PROGRAMS_PACKAGES=nginx-light,postgresql,redis-server,redis-tools,python3,wrk,curl,ca-certificates,procps

# wrap NAME REFERENCE CMD [ENTRYPOINT]: makes NAME.tar of the root file system in $SCRATCH/NAME-root.tar.
wrap() {
	(
		cd "$HERE"
		CGO_ENABLED=0 go build -trimpath -buildvcs=false -o "$SCRATCH/images" .
	)
	"$SCRATCH/images" -name "$2" -layer "$SCRATCH/$1-root.tar" -cmd "$3" -entrypoint "${4:-}" -o "$SCRATCH/$1.tar"
}

# pack DIR TAR: the same tar for the same files.
pack() {
	tar --owner=0 --group=0 --numeric-owner --sort=name --mtime=@$SOURCE_DATE_EPOCH -C "$1" -cf "$2" .
}

# busybox_root PROGRAM DIR: a root file system of busybox and nothing else.
busybox_root() {
	local root=$2 applet
	mkdir -p "$root"/{bin,dev,etc,home,proc,root,sbin,sys,tmp,usr/bin,usr/sbin,var/log,var/run}
	chmod 1777 "$root/tmp"
	cp "$1" "$root/bin/busybox"
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
}

make_busybox() {
	download_deb busybox-static "$SCRATCH/deb"
	busybox_root "$SCRATCH/deb/bin/busybox" "$SCRATCH/busybox"
	pack "$SCRATCH/busybox" "$SCRATCH/busybox-root.tar"
	wrap busybox docker.io/microvm/busybox:latest sh
	put "$SCRATCH/busybox.tar" "$IMAGES/busybox.tar"
}

# debian_sources TYPE: the mirrors this machine's apt uses for Debian 12, as lines of a sources.list; TYPE is deb or deb-src.
debian_sources() {
	# shellcheck disable=SC2016 # apt expands these
	apt-get indextargets --format "$1"' $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
		sort -u | grep ' bookworm'
}

# write_sources TYPE FILE
write_sources() {
	debian_sources "$1" >"$2" || { apt_update >&2 && debian_sources "$1" >"$2"; } ||
		die "apt has no mirror with the package lists of Debian 12 (bookworm)"
}

# download_source PACKAGE DIR: fetches and unpacks the upstream archive of a Debian source package, unpatched.
download_source() {
	local options=(
		-q -o Dir::Etc::SourceList="$2/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::lists="$2/lists"
		-o Dir::Cache="$2/cache" -o APT::Sandbox::User=root
	)
	mkdir -p "$2/lists/partial" "$2/cache"
	write_sources deb-src "$2/sources.list"
	(
		cd "$2" || exit
		apt-get "${options[@]}" update && apt-get "${options[@]}" source --download-only "$1"
	) >"$2/log" 2>&1 || { tail -n 20 "$2/log" >&2; die "apt-get could not download the source of $1"; }
	tar -C "$2" -xf "$2/$1"_*.orig.tar.*
}

# Debian's own busybox-static runs its applets in the shell's process ("standalone shell"), so that a container without
# /bin/ls still has ls; critest masks it and looks. With upstream's defaults an applet is found by its path.
build_busybox() {
	local source option
	packages gcc libc6-dev make bzip2
	download_source busybox "$SCRATCH/busybox-source"
	source=$(echo "$SCRATCH"/busybox-source/busybox-*/)
	(
		cd "$source" || exit
		make defconfig
		for option in STATIC=y FEATURE_SH_STANDALONE=n TC=n; do # tc does not compile with current kernel headers
			sed -i "/^\(# \)\?CONFIG_${option%=*}[= ]/d" .config
			echo "CONFIG_$option" >>.config
		done
		yes '' | make oldconfig || [ "${PIPESTATUS[1]}" = 0 ]
		make -j"$(nproc)"
	) >"$SCRATCH/busybox.log" 2>&1 || { tail -n 20 "$SCRATCH/busybox.log" >&2; die "busybox did not build"; }
	mv "$source/busybox" "$SCRATCH/box-busybox"
}

compile() { gcc -Wall -Werror -Os -static -s -o "$2" "$HERE/src/$1"; }

# nginx_conf PORT
nginx_conf() {
	cat <<-X
		user root;
		worker_processes 1;
		pid /var/run/nginx.pid;
		error_log stderr;
		events { worker_connections 64; }
		http {
			access_log off;
			default_type text/html;
			server { listen $1; listen [::]:$1; root /usr/share/nginx/html; }
		}
	X
}

# nginx_root DIR: Debian's nginx and the libraries it loads, to lie on the root file system of busybox.
nginx_root() {
	local root=$1 deb=$SCRATCH/nginx-deb package library lib=lib/x86_64-linux-gnu
	for package in nginx libc6 libcrypt1 libpcre2-8-0 libssl3 zlib1g; do download_deb "$package" "$deb"; done
	mkdir -p "$root"/{lib64,$lib,etc/nginx,usr/sbin,usr/share/nginx/html,var/lib/nginx,var/log/nginx}
	cp "$deb/usr/sbin/nginx" "$root/usr/sbin/"
	for library in libc.so.6 libcrypt.so.1 libpcre2-8.so.0 libssl.so.3 libcrypto.so.3 libz.so.1; do
		cp -L "$(find "$deb" -path "*/x86_64-linux-gnu/$library" | head -n 1)" "$root/$lib/"
	done
	cp -L "$deb/$lib/ld-linux-x86-64.so.2" "$root/lib64/"
	echo '<h1>Welcome to nginx!</h1>' >"$root/usr/share/nginx/html/index.html"
	nginx_conf 80 >"$root/etc/nginx/nginx.conf"
	chroot "$root" /usr/sbin/nginx -v 2>/dev/null || die "nginx does not start from the libraries collected for it"
}

make_pods() {
	local layers=$SCRATCH/layers image
	mkdir -p "$layers" "$SCRATCH"/{pause,nonewprivs,nginx-hostnet/etc/nginx,groups/etc}
	build_busybox
	busybox_root "$SCRATCH/box-busybox" "$SCRATCH/box"
	mkdir "$SCRATCH/box/www"
	echo 'busybox' >"$SCRATCH/box/www/index.html"
	pack "$SCRATCH/box" "$layers/busybox.tar"

	compile pause.c "$SCRATCH/pause/pause"
	pack "$SCRATCH/pause" "$layers/pause.tar"
	compile nonewprivs.c "$SCRATCH/nonewprivs/nonewprivs"
	chmod 4755 "$SCRATCH/nonewprivs/nonewprivs"
	pack "$SCRATCH/nonewprivs" "$layers/nonewprivs.tar"

	nginx_root "$SCRATCH/nginx"
	pack "$SCRATCH/nginx" "$layers/nginx.tar"
	nginx_conf 12003 >"$SCRATCH/nginx-hostnet/etc/nginx/nginx.conf"
	pack "$SCRATCH/nginx-hostnet" "$layers/nginx-hostnet.tar"

	{
		cat "$SCRATCH/box/etc/passwd"
		echo 'default-user:x:1000:1000::/home/default-user:/bin/sh'
	} >"$SCRATCH/groups/etc/passwd"
	{
		cat "$SCRATCH/box/etc/group"
		printf '%s\n' default-user:x:1000: group-defined-in-image:x:50000:default-user
	} >"$SCRATCH/groups/etc/group"
	pack "$SCRATCH/groups" "$layers/groups.tar"

	ln "$layers/busybox.tar" "$SCRATCH/box-root.tar"
	wrap box docker.io/microvm/box:latest sh
	ln "$layers/pause.tar" "$SCRATCH/pause-root.tar"
	wrap pause docker.io/microvm/pause:latest '' /pause
	tar -C "$SCRATCH/nginx" -cf - . | tar -C "$SCRATCH/box" -xf -
	sed -i '1i daemon off;' "$SCRATCH/box/etc/nginx/nginx.conf"
	pack "$SCRATCH/box" "$SCRATCH/web-root.tar"
	wrap web docker.io/microvm/web:latest nginx
	for image in box pause web; do put "$SCRATCH/$image.tar" "$IMAGES/$image.tar"; done
	rm -rf "$IMAGES/layers"
	mv "$layers" "$IMAGES/layers"
}

# agnhost is the program that most of Kubernetes' own tests run in their pods; some call curl and bash in there.
make_conformance() {
	packages curl
	"$REPO/hack/tools/build.sh" kubernetes-e2e
	local root=$SCRATCH/agnhost library program
	mkdir -p "$root"/{bin,lib64,lib/x86_64-linux-gnu,usr/bin,etc,uploads,home/user-defined-in-image}
	cp "$MICROVM_CACHE/tools/bin/agnhost" "$root/"
	ln -s agnhost "$root/agnhost-2"
	for program in /usr/bin/curl /bin/bash; do
		cp "$program" "$root$program"
		ldd "$program" | grep -oE '/[^ ]+' | while read -r library; do
			case $library in
			/lib64/*) cp -L "$library" "$root/lib64/" ;;
			*) cp -L "$library" "$root/lib/x86_64-linux-gnu/" ;;
			esac
		done
		chroot "$root" "$program" --version >/dev/null || die "$program does not start from the libraries collected for it"
	done
	tar -xOf "$IMAGES/layers/busybox.tar" ./etc/passwd >"$root/etc/passwd"
	echo 'user-defined-in-image:x:1000:1000:,,,:/home/user-defined-in-image:/bin/sh' >>"$root/etc/passwd"
	tar -xOf "$IMAGES/layers/busybox.tar" ./etc/group >"$root/etc/group"
	printf '%s\n' user-defined-in-image:x:1000: group-defined-in-image:x:50000:user-defined-in-image >>"$root/etc/group"
	pack "$root" "$SCRATCH/agnhost.tar"
	put "$SCRATCH/agnhost.tar" "$IMAGES/layers/agnhost.tar"
}

make_debian() { debian_image debian $DEBIAN_PACKAGES; }

make_programs() { debian_image programs $PROGRAMS_PACKAGES; }

# debian_image NAME PACKAGE,...: makes docker.io/microvm/NAME:bookworm.
debian_image() {
	packages mmdebstrap
	local sources=$SCRATCH/sources.list log=$SCRATCH/mmdebstrap.log
	write_sources deb "$sources"
	apt-config dump | grep -E '^Acquire::https?::Proxy' >"$SCRATCH/apt.conf" || true
	# shellcheck disable=SC2016 # $1 is the hook's
	mmdebstrap --mode=root --variant=minbase --include="$2" --aptopt="$SCRATCH/apt.conf" \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
		--customize-hook='rm -rf "$1"/etc/apt/sources.list* "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/hostname "$1"/etc/resolv.conf' \
		bookworm "$SCRATCH/$1-root.tar" "$sources" >"$log" 2>&1 ||
		{ tail -n 30 "$log" >&2; die "mmdebstrap failed"; }
	wrap "$1" "docker.io/microvm/$1:bookworm" bash
	put "$SCRATCH/$1.tar" "$IMAGES/$1.tar"
}

# key NAME: of what an image is made of.
key() {
	local files=("$HERE"/{build.sh,main.go,go.mod})
	if [ "$1" = pods ]; then files+=("$HERE"/src/*); fi
	cat "${files[@]}" | sha256sum | cut -c 1-20
}

# files NAME: what is made of it.
files() {
	case $1 in
	pods) echo "$IMAGES"/{box,pause,web}.tar "$IMAGES"/layers/{busybox,groups,nginx,nginx-hostnet,nonewprivs,pause}.tar ;;
	conformance) echo "$IMAGES/layers/agnhost.tar" ;; # goes with the other layers when those are made again
	*) echo "$IMAGES/$1.tar" ;;
	esac
}

present() {
	local file
	for file in $(files "$1"); do [ -e "$file" ] || return 1; done
	[ "$(cat "$IMAGES/$1.key" 2>/dev/null)" = "$(key "$1")" ]
}

scratch
[ $# -gt 0 ] || set -- busybox debian
for name; do
	case $name in busybox | debian | pods | programs | conformance) ;; *) die "unknown image $name" ;; esac
	present "$name" || lock "$IMAGES/lock"
	if ! present "$name"; then
		start=$SECONDS
		say "making $name"
		rm -f "$IMAGES/$name.key"
		"make_$name"
		key "$name" >"$IMAGES/$name.key"
		say "$name made in $((SECONDS - start)) s"
	fi
	for file in $(files "$name"); do say "$file: $(stat -c %s "$file") bytes"; done
done
