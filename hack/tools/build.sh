#!/bin/bash
# Builds the programs the tests need beside our own, through the Go module proxy, into $MICROVM_CACHE/tools/bin.
# usage: hack/tools/build.sh [containerd|runc|cri-tools|cni|crane|etcd|gvisor|kubernetes|kubernetes-e2e|all]...
#        (default: containerd runc)
# A program that is there in the version named below is left alone. CNI plugins go to tools/bin/cni.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

CONTAINERD=v2.4.2
RUNC=v1.5.2
CRI_TOOLS=v1.36.0
CNI=v1.9.1
CRANE=v0.22.1
ETCD=v3.7.3
KUBERNETES=v1.36.3
# Of its branch go, which is what can be built with Go alone.
GVISOR=v0.0.0-20260905035102-160fafc42237

TOOLS=$MICROVM_CACHE/tools
BIN=$TOOLS/bin

# module PATH@VERSION: makes and enters a throw-away module that depends on it.
module() {
	mkdir -p "$SCRATCH/module" "$SCRATCH/out"
	cd "$SCRATCH/module"
	go mod init microvm.invalid/tools 2>/dev/null
	go get "$1" 2>"$SCRATCH/get.log" || { cat "$SCRATCH/get.log" >&2; die "go get $1 failed"; }
}

# compile LDFLAGS TAGS PACKAGE...
compile() {
	local ldflags=$1 tags=$2
	shift 2
	quietly go build -mod=mod -trimpath -buildvcs=false -tags "$tags" -ldflags "-s -w $ldflags" -o "$SCRATCH/out/" "$@"
}

# quietly GO...: without a line for each module it downloads.
quietly() { "$@" 2> >(grep -v '^go: downloading ' >&2 || :); }

build_containerd() {
	local p=github.com/containerd/containerd/v2
	module $p@$CONTAINERD
	CGO_ENABLED=0 compile "-X $p/version.Version=$CONTAINERD -X $p/version.Revision=module-proxy" \
		"no_btrfs no_zfs urfave_cli_no_docs" $p/cmd/containerd $p/cmd/ctr $p/cmd/containerd-shim-runc-v2
}

build_runc() {
	packages gcc libc6-dev libseccomp-dev pkg-config
	module github.com/opencontainers/runc@$RUNC
	CGO_ENABLED=1 compile "-extldflags -static" "seccomp netgo osusergo" github.com/opencontainers/runc
}

build_cri_tools() {
	local p=sigs.k8s.io/cri-tools
	module $p@$CRI_TOOLS
	CGO_ENABLED=0 compile "-X $p/pkg/version.Version=$CRI_TOOLS" "" $p/cmd/crictl
	# critest is a test binary: its specs are ginkgo's.
	CGO_ENABLED=0 go test -c -mod=mod -trimpath -ldflags "-s -w" -o "$SCRATCH/out/critest" $p/cmd/critest
}

build_cni() {
	local p=github.com/containernetworking/plugins/plugins
	module github.com/containernetworking/plugins@$CNI
	mkdir -p "$SCRATCH/out/cni"
	CGO_ENABLED=0 go build -mod=mod -trimpath -buildvcs=false -ldflags "-s -w" -o "$SCRATCH/out/cni/" \
		$p/main/{bridge,loopback,ptp,macvlan} $p/ipam/{host-local,static} $p/meta/{portmap,firewall,tuning,bandwidth}
}

build_crane() {
	module github.com/google/go-containerregistry/cmd/crane@$CRANE
	CGO_ENABLED=0 compile "" "" github.com/google/go-containerregistry/cmd/crane
}

build_etcd() {
	module go.etcd.io/etcd/server/v3@$ETCD
	# The module's root is the program; go build would call it v3.
	CGO_ENABLED=0 go build -mod=mod -trimpath -buildvcs=false -ldflags "-s -w" -o "$SCRATCH/out/etcd" go.etcd.io/etcd/server/v3
}

build_gvisor() {
	module gvisor.dev/gvisor@$GVISOR
	CGO_ENABLED=0 compile "" "" gvisor.dev/gvisor/runsc
	CGO_ENABLED=0 quietly go build -mod=mod -trimpath -buildvcs=false -ldflags "-s -w" -o "$SCRATCH/out/containerd-shim-runsc-v1" gvisor.dev/gvisor/shim
}

# kubernetes_module: a throw-away module that depends on Kubernetes. Its own go.mod takes its libraries from the tree's folder
# staging, which is not part of the module: each is a module of its own, in the version that belongs to the release.
kubernetes_module() {
	local dir
	mkdir -p "$SCRATCH/module" "$SCRATCH/out"
	cd "$SCRATCH/module"
	dir=$(go mod download -json k8s.io/kubernetes@$KUBERNETES | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	[ -d "$dir" ] || die "no module k8s.io/kubernetes@$KUBERNETES"
	{
		echo "module microvm.invalid/tools"
		grep -E '^(go|godebug) ' "$dir/go.mod"
		echo "require k8s.io/kubernetes $KUBERNETES"
		sed -nE "s,^\s*(replace )?(k8s\.io/\S+) => \./staging/.*,replace \2 => \2 v0.${KUBERNETES#v1.},p" "$dir/go.mod"
	} >go.mod
}

KUBERNETES_LDFLAGS="-X k8s.io/component-base/version.gitVersion=$KUBERNETES -X k8s.io/component-base/version.gitMajor=1
	-X k8s.io/component-base/version.gitMinor=${KUBERNETES:3:2} -X k8s.io/component-base/version.gitTreeState=clean
	-X k8s.io/client-go/pkg/version.gitVersion=$KUBERNETES"

build_kubernetes() {
	kubernetes_module
	CGO_ENABLED=0 compile "$KUBERNETES_LDFLAGS" "" \
		k8s.io/kubernetes/cmd/{kubelet,kube-apiserver,kube-controller-manager,kube-scheduler,kubectl,kube-proxy}
}

# Kubernetes' own end-to-end tests, ginkgo in the version they were compiled with, and the program of their images.
build_kubernetes_e2e() {
	kubernetes_module
	CGO_ENABLED=0 compile "$KUBERNETES_LDFLAGS" "" k8s.io/kubernetes/test/images/agnhost github.com/onsi/ginkgo/v2/ginkgo
	CGO_ENABLED=0 quietly go test -c -mod=mod -trimpath -ldflags "-s -w $KUBERNETES_LDFLAGS" -o "$SCRATCH/out/e2e.test" k8s.io/kubernetes/test/e2e
}

# present NAME VERSION PROGRAM...: is this group installed, whole and in this version? The stamp is written last.
present() {
	local program stamp=$TOOLS/stamps/$1-$2
	shift 2
	for program; do [ -x "$BIN/$program" ] || return 1; done
	[ -e "$stamp" ]
}

# tool NAME VERSION PROGRAM...: builds a group unless it is there.
tool() {
	local name=$1 version=$2 program start=$SECONDS
	if ! present "$@"; then lock "$TOOLS/lock"; fi
	if present "$@"; then
		say "$name $version is there"
		return
	fi
	shift 2
	say "building $name $version"
	rm -rf "$SCRATCH/module" "$SCRATCH/out"
	(set -e; "build_${name//-/_}")
	rm -f "$TOOLS/stamps/$name"-*
	for program; do put "$SCRATCH/out/$program" "$BIN/$program"; done
	mkdir -p "$TOOLS/stamps"
	touch "$TOOLS/stamps/$name-$version"
	say "$name $version built in $((SECONDS - start)) s"
}

scratch
[ $# -gt 0 ] || set -- containerd runc
if [ "$1" = all ]; then set -- containerd runc cri-tools cni crane etcd gvisor kubernetes kubernetes-e2e; fi
for name; do
	case $name in
	containerd) tool containerd $CONTAINERD containerd ctr containerd-shim-runc-v2 ;;
	runc) tool runc $RUNC runc ;;
	cri-tools) tool cri-tools $CRI_TOOLS crictl critest ;;
	cni) tool cni $CNI cni/{bridge,loopback,ptp,macvlan,host-local,static,portmap,firewall,tuning,bandwidth} ;;
	crane) tool crane $CRANE crane ;;
	etcd) tool etcd $ETCD etcd ;;
	gvisor) tool gvisor $GVISOR runsc containerd-shim-runsc-v1 ;;
	kubernetes)
		tool kubernetes $KUBERNETES kubelet kube-{apiserver,controller-manager,scheduler,proxy} kubectl
		;;
	kubernetes-e2e) tool kubernetes-e2e $KUBERNETES e2e.test ginkgo agnhost ;;
	*) die "unknown tool $name" ;;
	esac
done
