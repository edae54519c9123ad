#!/bin/bash
# Runs a private containerd whose every file, socket and log is below one state folder.
# usage: hack/containerd.sh start STATE   start it (also over the state of an earlier one) and wait until it answers
#        hack/containerd.sh stop STATE    end its containers, shims and itself; keeps images and logs
#        hack/containerd.sh wipe STATE    stop, and remove STATE
# Clients use `ctr -a STATE/containerd.sock`. It finds shims in bin/ of this checkout, then in the tools of the cache.
# With a file system in STATE/blockfile.ext4 it has the snapshotter blockfile, which makes copies of that, and with the name of a
# thin pool in STATE/thinpool the snapshotter devmapper. STATE/snapshotter names the one that pods have (overlayfs).
# STATE/config.toml is the shim's own configuration, through MICROVM_CONFIG; STATE/env may set variables for containerd
# and so for its shims. STATE must be short: its sockets' paths end up in struct sockaddr_un. With KEEP=1 in the environment a
# containerd that is killed is started again.
#
# With CRI=podsandbox or CRI=shim in the environment it is a node for pods too, with the runtime handlers runc and microvm (and
# runsc, if the tools have gVisor). microvm has that sandboxer, and CRI_DEFAULT (runc) is what pods get that name none; clients
# then use `crictl -c STATE/crictl.yaml`. Pods are on a bridge, so it runs only in a network namespace without links to elsewhere
# (unshare --net, or the test bed); every registry's name means 127.0.0.1:5000. CNI plugins that are not in the tools may be put
# into STATE/cni/bin, further networks into STATE/cni/conf; libcni keeps its results in /var/lib/cni.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH=$top/bin:${MICROVM_CACHE:-$HOME/.cache/microvm}/tools/bin:$PATH
die() { echo "hack/containerd.sh: $*" >&2; exit 1; }

[ $# = 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$2"
state=$(cd "$2" && pwd -P)
[ ${#state} -le 40 ] || die "the state folder's path is longer than 40 characters: $state"
[[ $state =~ ^[A-Za-z0-9/._-]+$ ]] || die "the state folder's path has unusual characters: $state"

# Once a node for pods, always one: stopping it may take starting it first.
CRI=${CRI:-$(cat "$state/cri" 2>/dev/null || :)}
case $CRI in '' | podsandbox | shim) ;; *) die "CRI is podsandbox or shim, not $CRI" ;; esac

pid() { # of our containerd, if it runs: pids are used again, so its command line must be ours
	local p
	p=$(cat "$state/containerd.pid" 2>/dev/null) && grep -qsFz -- "$state/containerd.toml" "/proc/$p/cmdline" && echo "$p"
}
ctr() { command ctr -a "$state/containerd.sock" "$@"; }

# gone PID TENTHS: waits for a process to end.
gone() {
	local i
	for ((i = 0; i < $2; i++)); do [ -d "/proc/$1" ] || return 0; sleep 0.1; done
	return 1
}

# no_cri: what to disable where no CRI is asked for. It would listen on a TCP port for streaming.
no_cri() {
	[ -n "$CRI" ] || echo "'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime', 'io.containerd.grpc.v1.cri'," \
		"'io.containerd.podsandbox.controller.v1.podsandbox',"
}

# handler: the configuration file of the runtime handler microvm, the same that a user takes.
handler() { [ -z "$CRI" ] || echo "'$top/deploy/k8s/containerd-$CRI.toml'"; }

# no_blockfile: what to disable where there is nothing for it to copy.
no_blockfile() { [ -f "$state/blockfile.ext4" ] || echo "'io.containerd.snapshotter.v1.blockfile',"; }

# no_devmapper: the same, where there is no pool.
no_devmapper() { [ -f "$state/thinpool" ] || echo "'io.containerd.snapshotter.v1.devmapper',"; }

configure_cri() {
	local other tools=${MICROVM_CACHE:-$HOME/.cache/microvm}/tools/bin
	echo "$CRI" >"$state/cri"
	# Whose namespace it is cannot be asked everywhere, not even as root; one of our own has no link to anywhere else. (node0
	# is hack/k8s.sh's.)
	other=$(ip -o link show up | awk -F '[:@ ]+' -v ours="^(lo|pods0|node0|veth.*${MICROVM_TESTBED:+|eth0})\$" '$2 !~ ours { print $2; exit }')
	[ -z "$other" ] || die "pods need a network namespace of their own, and here is $other: run this under unshare --net"
	command -v nft >/dev/null || die "the portmap plugin needs nft: apt-get install nftables"
	ip link set lo up
	# The root of a pod with a user namespace is nobody here, and must reach its files.
	chmod 711 "$state"
	mkdir -p "$state"/cni/{bin,conf,ipam} "$state/certs.d/_default"
	# The MTU is an odd one so that tests can tell that it arrives.
	cat >"$state/cni/conf/50-pods.conflist" <<-X
		{
		  "cniVersion": "1.0.0", "name": "pods",
		  "plugins": [
		    {
		      "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true, "mtu": 1450,
		      "ipam": {
		        "type": "host-local", "dataDir": "$state/cni/ipam",
		        "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
		        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
		      }
		    },
		    {"type": "portmap", "backend": "nftables", "capabilities": {"portMappings": true}}
		  ]
		}
	X
	cat >"$state/certs.d/_default/hosts.toml" <<-X
		server = 'http://127.0.0.1:5000'
		[host.'http://127.0.0.1:5000']
		  capabilities = ['pull', 'resolve']
	X
	# A client's patience: in the emulated machine everything takes its time.
	cat >"$state/crictl.yaml" <<-X
		runtime-endpoint: unix://$state/containerd.sock
		image-endpoint: unix://$state/containerd.sock
		timeout: $([ -n "${MICROVM_TESTBED:-}" ] && echo 600 || echo 60)
	X
	# restrict_oom_score_adj: without CAP_SYS_RESOURCE nobody can lower a score.
	cat >>"$state/containerd.toml" <<-X
		[plugins.'io.containerd.cri.v1.images']
		  snapshotter = '$(cat "$state/snapshotter" 2>/dev/null || echo overlayfs)'
		  [plugins.'io.containerd.cri.v1.images'.pinned_images]
		    sandbox = 'docker.io/microvm/pause:latest'
		  [plugins.'io.containerd.cri.v1.images'.registry]
		    config_path = '$state/certs.d'
		[plugins.'io.containerd.grpc.v1.cri']
		  stream_server_address = '127.0.0.1'
		  stream_server_port = '0'
		[plugins.'io.containerd.cri.v1.runtime']
		  restrict_oom_score_adj = true
		  netns_mounts_under_state_dir = true
		  [plugins.'io.containerd.cri.v1.runtime'.cni]
		    bin_dirs = ['$tools/cni', '$state/cni/bin']
		    conf_dir = '$state/cni/conf'
		  [plugins.'io.containerd.cri.v1.runtime'.containerd]
		    default_runtime_name = '${CRI_DEFAULT:-runc}'
		    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
		      runtime_type = 'io.containerd.runc.v2'
		      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
		        BinaryName = '$tools/runc'
		        Root = '$state/runc'
	X
	[ ! -x "$tools/containerd-shim-runsc-v1" ] || cat >>"$state/containerd.toml" <<-X
		    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runsc]
		      runtime_type = 'io.containerd.runsc.v1'
	X
}

start() {
	pid >/dev/null && die "already running: pid $(pid)"
	mkdir -p "$state"/{root,state,shims}
	cat >"$state/containerd.toml" <<-X
		version = 4
		root = '$state/root'
		state = '$state/state'
		imports = [$(handler)]
		disabled_plugins = [
		  $(no_cri)
		  'io.containerd.nri.v1.nri',
		  'io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing',
		  $(no_devmapper) $(no_blockfile)
		]
		[plugins.'io.containerd.server.v1.grpc']
		  address = '$state/containerd.sock'
		[plugins.'io.containerd.server.v1.ttrpc']
		  address = '$state/containerd.sock.ttrpc'
		[plugins.'io.containerd.server.v1.debug']
		  address = '$state/containerd.sock.debug'
		[plugins.'io.containerd.shim.v1.manager']
		  socket_dir = '$state/shims'
		[plugins.'io.containerd.internal.v1.opt']
		  path = '$state/opt'
		[plugins.'io.containerd.snapshotter.v1.blockfile']
		  scratch_file = '$state/blockfile.ext4'
		  fs_type = 'ext4'
		[plugins.'io.containerd.snapshotter.v1.devmapper']
		  pool_name = '$(cat "$state/thinpool" 2>/dev/null || :)'
		  base_image_size = '64MB'
		# The size of a container's writable layer: without one it is a directory, and nothing is the guest's to mount.
		[plugins.'io.containerd.snapshotter.v1.erofs']
		  default_size = '64MiB'
	X
	[ -z "$CRI" ] || configure_cri
	if [ ! -f "$state/config.toml" ]; then
		cat >"$state/config.toml" <<-X
			kernel = '$top/bin/vmlinux'
			image = '$top/bin/guest.erofs'
			vmm = '$top/bin/microvm-vmm'
		X
		# A guest in an emulated machine on a busy host.
		[ -z "${MICROVM_TESTBED:-}" ] || echo "boot_timeout = '5m'" >>"$state/config.toml"
	fi
	(
		export MICROVM_CONFIG=$state/config.toml
		if [ -f "$state/env" ]; then
			set -a
			# shellcheck source=/dev/null
			. "$state/env"
			set +a
		fi
		cd /
		exec setsid ${KEEP:+"$top/hack/keep.sh"} containerd --config "$state/containerd.toml" --log-level "${CONTAINERD_LOG_LEVEL:-info}"
	) </dev/null >>"$state/containerd.log" 2>&1 &
	local p=$!
	echo "$p" >"$state/containerd.pid"
	# The socket file appears shortly before it is served; ctr then waits for the answer.
	for ((i = 0; i < 600; i++)); do
		[ -d "/proc/$p" ] || { tail -n 20 "$state/containerd.log" >&2; die "containerd ended at its start"; }
		[ -S "$state/containerd.sock" ] && ctr version >/dev/null 2>&1 && return
		sleep 0.1
	done
	stop
	die "containerd did not answer within a minute; its log is $state/containerd.log"
}

# shims: pids of processes that were given our socket's address. It is in our state folder, so they can be nobody else's.
# The pattern is no literal because grep's own command line must not match it.
shims() { grep -lsxz -- "$state/containerd[.]sock" /proc/[0-9]*/cmdline | sed 's,/proc/\([0-9]*\)/.*,\1,'; }

stop() {
	local p ns id out
	# A containerd that died leaves its containers running, and only containerd can end them properly.
	if ! pid >/dev/null && [ -n "$(shims)" ]; then start; fi
	if p=$(pid); then
		# Pods first, as pods: that takes their networks down too.
		[ -z "$CRI" ] || out=$(crictl -c "$state/crictl.yaml" rmp --all --force 2>&1) ||
			echo "hack/containerd.sh: could not remove all pods: $out" >&2
		for ns in $(ctr namespaces ls -q 2>/dev/null); do
			for id in $(ctr -n "$ns" tasks ls -q 2>/dev/null); do
				ctr -n "$ns" tasks rm -f "$id" >/dev/null 2>&1 || echo "hack/containerd.sh: could not remove task $id" >&2
			done
			for id in $(ctr -n "$ns" containers ls -q 2>/dev/null); do
				ctr -n "$ns" containers rm "$id" >/dev/null 2>&1 || echo "hack/containerd.sh: could not remove container $id" >&2
			done
			# runc leaves the namespace's own cgroup; it goes only if nothing is in it.
			rmdir "/sys/fs/cgroup/$ns" /sys/fs/cgroup/*/"$ns" 2>/dev/null || :
		done
		kill "$p"
		gone "$p" 300 || kill -KILL -- "-$p" # with what keeps it
	fi
	rm -f "$state/containerd.pid"
	for p in $(shims); do
		echo "hack/containerd.sh: ending a process left behind: $(tr '\0' ' ' <"/proc/$p/cmdline")" >&2
		kill -KILL "$p" 2>/dev/null || :
		gone "$p" 50 || :
	done
	awk -v s="$state/" 'index($5, s) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r m; do umount -l "$m"; done
	rm -rf "$state"/containerd.sock* "$state/shims" "$state/state"
}

case $1 in
start) start ;;
stop) stop ;;
wipe) stop; rm -rf "$state" ;;
*) die "unknown command $1" ;;
esac
