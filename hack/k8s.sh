#!/bin/bash
# Runs a private one-node Kubernetes whose every file, socket and log is below one state folder.
# usage: hack/k8s.sh start STATE                 control plane and node, and wait until the node is ready
#        hack/k8s.sh control STATE               the control plane only: etcd, apiserver, controller-manager, scheduler
#        hack/k8s.sh node STATE CREDENTIALS      a node only: containerd, kubelet, kube-proxy; CREDENTIALS is the control
#                                                plane's STATE/node, which may be on another machine. Whoever kills one
#                                                of the first two finds it started again, as systemd does it on other nodes
#        hack/k8s.sh ready STATE                 wait until the node of the control plane in STATE is ready, and make the RuntimeClass
#        hack/k8s.sh stop STATE                  end pods, containerd and all else; keeps logs, images and etcd's data
#        hack/k8s.sh wipe STATE                  stop, and remove STATE
# Clients use KUBECONFIG=STATE/admin.conf. containerd is hack/containerd.sh's in STATE/c, with the handlers microvm and runc; CRI
# and CRI_DEFAULT are that script's. STATE must be short.
#
# It wants a network namespace without links to elsewhere, and mounts that nobody else sees:
#   unshare --net --mount -- bash -c 'hack/k8s.sh start DIR; …; hack/k8s.sh wipe DIR'
# The control plane has the address 10.87.0.1 and the node 10.87.0.2. The node's own is on eth0 where there is such a link, as in
# the test bed, else both are on a bridge without ports; the control plane's is on bed0, the other end of that eth0.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH=$top/bin:${MICROVM_CACHE:-$HOME/.cache/microvm}/tools/bin:$PATH
say() { echo "hack/k8s.sh: $*" >&2; }
die() { say "$*"; exit 1; }
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

mkdir -p "$2"
state=$(cd "$2" && pwd -P)
[ ${#state} -le 36 ] || die "the state folder's path is longer than 36 characters: $state"

# The root of a pod with a user namespace is nobody here, and must reach its files.
chmod 711 "$state"

CONTROL_IP=10.87.0.1 NODE_IP=10.87.0.2
PODS=10.88.0.0/16 # as in hack/containerd.sh
SERVICES=10.96.0.0/16
NODE=node
# The node's pods are below this cgroup.
CGROUP=microvm-k8s
# What the kubelet and kube-proxy set of the kernel, where that is not of a namespace: put back at the end.
SYSCTLS='vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes'
# up NAME COMMAND...: starts a daemon of ours, unless it runs.
up() {
	local name=$1
	shift
	! pid "$name" >/dev/null || return 0
	mkdir -p "$state/log" "$state/run"
	(cd / && exec setsid "$@") </dev/null >>"$state/log/$name.log" 2>&1 &
	echo $! >"$state/run/$name.pid"
}

# pid NAME: of our daemon, if it runs: pids are used again, so its command line must be ours.
pid() {
	local p
	p=$(cat "$state/run/$1.pid" 2>/dev/null) && grep -qsFz -- "$state/" "/proc/$p/cmdline" && echo "$p"
}

# down NAME: ends it. The apiserver would wait a minute for its clients to leave.
down() {
	local p
	if p=$(pid "$1"); then
		kill "$p"
		wait_for 10 "" gone "$p" || kill -KILL -- "-$p" # with what it keeps
	fi
	rm -f "$state/run/$1.pid"
}
gone() { [ ! -d "/proc/$1" ] || grep -qs '^State:.Z' "/proc/$1/status"; }

# wait_for SECONDS DAEMON COMMAND...: until it succeeds, or the daemon has ended.
wait_for() {
	local end=$((SECONDS + $1)) daemon=$2
	shift 2
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $end ] || return 1
		[ -z "$daemon" ] || pid "$daemon" >/dev/null || { tail -n 20 "$state/log/$daemon.log" >&2; die "$daemon has ended"; }
		sleep 0.2
	done
}

# address IP LINK: gives the link, or a bridge without ports where it is not there, an address. (The kubelet takes none of loopback.)
address() {
	local link=$2
	ip link set lo up
	if ! ip link show "$link" >/dev/null 2>&1; then
		link=node0
		ip link show node0 >/dev/null 2>&1 || ip link add node0 type bridge
	fi
	ip address replace "$1/24" dev "$link"
	ip link set "$link" up
}

# certificate NAME SUBJECT [ALTERNATIVE NAMES]
certificate() {
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
	openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" \
		-extfile <(printf 'extendedKeyUsage=serverAuth,clientAuth\n%s\n' "${3:+subjectAltName=$3}") 2>/dev/null
}

certificates() {
	mkdir -p "$state/pki"
	cd "$state/pki"
	[ ! -f complete ] || return 0
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 3650 -subj /CN=microvm-test 2>/dev/null
	certificate apiserver /CN=kube-apiserver \
		"IP:127.0.0.1,IP:$CONTROL_IP,IP:${SERVICES%0.0/*}0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
	certificate apiserver-client /O=system:masters/CN=apiserver-client
	certificate admin /O=system:masters/CN=admin
	certificate controller-manager /CN=system:kube-controller-manager
	certificate scheduler /CN=system:kube-scheduler
	certificate proxy /CN=system:kube-proxy
	certificate kubelet "/O=system:nodes/CN=system:node:$NODE" "IP:$NODE_IP,DNS:$NODE"
	openssl ecparam -name prime256v1 -genkey -noout -out sa.key
	openssl ec -in sa.key -pubout -out sa.pub 2>/dev/null
	touch complete
}

# kubeconfig USER FILE
kubeconfig() {
	base64() { command base64 -w 0 "$state/pki/$1"; }
	cat >"$2" <<-Y
		apiVersion: v1
		kind: Config
		clusters: [{name: c, cluster: {server: 'https://$CONTROL_IP:6443', certificate-authority-data: $(base64 ca.crt)}}]
		users: [{name: u, user: {client-certificate-data: $(base64 "$1.crt"), client-key-data: $(base64 "$1.key")}}]
		contexts: [{name: c, context: {cluster: c, user: u}}]
		current-context: c
	Y
}

kubectl() { command kubectl --kubeconfig "$state/admin.conf" "$@"; }

control() {
	command -v openssl >/dev/null || die "certificates need openssl: apt-get install openssl"
	local name
	address $CONTROL_IP bed0
	if ip link show bed0 >/dev/null 2>&1; then
		ip route replace $PODS via $NODE_IP
		ip route replace $SERVICES via $NODE_IP
	fi
	(certificates)
	mkdir -p "$state/node"
	cp "$state"/pki/{ca.crt,kubelet.crt,kubelet.key} "$state/node/"
	for name in admin controller-manager scheduler; do kubeconfig $name "$state/$name.conf"; done
	for name in kubelet proxy; do kubeconfig $name "$state/node/$name.conf"; done

	up etcd etcd --data-dir "$state/etcd" --unsafe-no-fsync --logger zap --log-level warn \
		--listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
		--listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster default=http://127.0.0.1:2380
	up apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=$CONTROL_IP --secure-port=6443 --advertise-address=$CONTROL_IP \
		--client-ca-file="$state/pki/ca.crt" --tls-cert-file="$state/pki/apiserver.crt" --tls-private-key-file="$state/pki/apiserver.key" \
		--kubelet-client-certificate="$state/pki/apiserver-client.crt" --kubelet-client-key="$state/pki/apiserver-client.key" \
		--kubelet-certificate-authority="$state/pki/ca.crt" --kubelet-preferred-address-types=InternalIP \
		--service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$state/pki/sa.pub" \
		--service-account-signing-key-file="$state/pki/sa.key" --service-cluster-ip-range=$SERVICES \
		--authorization-mode=Node,RBAC --allow-privileged=true
	wait_for 120 apiserver kubectl get --raw /readyz || die "the apiserver is not ready; its log is $state/log/apiserver.log"
	up controller-manager kube-controller-manager --kubeconfig="$state/controller-manager.conf" --bind-address=127.0.0.1 --leader-elect=false \
		--authentication-kubeconfig="$state/controller-manager.conf" --authorization-kubeconfig="$state/controller-manager.conf" \
		--root-ca-file="$state/pki/ca.crt" --service-account-private-key-file="$state/pki/sa.key" --use-service-account-credentials
	up scheduler kube-scheduler --kubeconfig="$state/scheduler.conf" --bind-address=127.0.0.1 --leader-elect=false \
		--authentication-kubeconfig="$state/scheduler.conf" --authorization-kubeconfig="$state/scheduler.conf"
}

# cgroups: the parent of all pods. cgroup v1 has one in each hierarchy, and a cpuset that starts out empty.
cgroups() {
	local dir
	if [ -f /sys/fs/cgroup/cgroup.controllers ]; then
		mkdir -p /sys/fs/cgroup/$CGROUP
		sed 's/[^ ]*/+&/g' /sys/fs/cgroup/cgroup.controllers >/sys/fs/cgroup/cgroup.subtree_control
		return
	fi
	for dir in cpu cpuacct cpuset memory pids devices freezer blkio hugetlb systemd; do
		[ ! -d /sys/fs/cgroup/$dir ] || mkdir -p /sys/fs/cgroup/$dir/$CGROUP
	done
	for dir in cpus mems; do cat /sys/fs/cgroup/cpuset/cpuset.$dir >/sys/fs/cgroup/cpuset/$CGROUP/cpuset.$dir; done
}

remove_cgroups() {
	# Only once more than the deepest is empty is its parent.
	find /sys/fs/cgroup/$CGROUP /sys/fs/cgroup/*/$CGROUP -depth -type d -exec rmdir {} + 2>/dev/null || :
}

# disk: a block device for tests of volumes. Its name becomes a label of the node.
disk() {
	local device
	if [ ! -f "$state/disk" ]; then
		truncate -s 128M "$state/disk.img"
		device=$(losetup --find --show "$state/disk.img")
		echo "${device#/dev/}" >"$state/disk"
	fi
	cat "$state/disk"
}

images() {
	local image dir=${MICROVM_CACHE:-$HOME/.cache/microvm}/images
	local ctr=(ctr -a "$state/c/containerd.sock" -n k8s.io)
	for image in ${IMAGES:-pause box web}; do "${ctr[@]}" images import "$dir/$image.tar" >/dev/null; done
	# The names that the examples in deploy/k8s have.
	"${ctr[@]}" images tag --force docker.io/microvm/box:latest docker.io/library/busybox:stable >/dev/null
	"${ctr[@]}" images tag --force docker.io/microvm/web:latest docker.io/library/nginx:stable >/dev/null
}

node() {
	local credentials=$1 name
	[ -f "$credentials/kubelet.conf" ] || die "no credentials in $credentials"
	# In the test bed, which has modules: the NIC, and what sends bridged frames through the rules of Services.
	[ -z "${MICROVM_TESTBED:-}" ] || modprobe -a virtio_net br_netfilter
	address $NODE_IP eth0
	echo 1 >/proc/sys/net/ipv4/ip_forward
	for name in $SYSCTLS; do
		mkdir -p "$state/sysctl"
		[ -f "$state/sysctl/${name//\//-}" ] || cat "/proc/sys/$name" >"$state/sysctl/${name//\//-}"
	done
	cgroups
	CRI=${CRI:-podsandbox} KEEP=1 "$top/hack/containerd.sh" start "$state/c"
	images
	# Mounts of the node are the containers' to see, some of them both ways: systemd has it so, unshare does not.
	mount --make-rshared /
	mkdir -p "$state/kubelet" "$state/podlogs" "$state/manifests"
	cp -r "$top/test/e2e/k8s/seccomp" "$state/kubelet/"
	echo 'nameserver 127.0.0.1' >"$state/resolv.conf"
	# oomScoreAdj: without CAP_SYS_RESOURCE nobody can lower a score.
	cat >"$state/kubelet.yaml" <<-Y
		apiVersion: kubelet.config.k8s.io/v1beta1
		kind: KubeletConfiguration
		containerRuntimeEndpoint: unix://$state/c/containerd.sock
		failCgroupV1: false
		cgroupDriver: cgroupfs
		cgroupRoot: /$CGROUP
		address: $NODE_IP
		port: 10250
		healthzPort: 0
		authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $credentials/ca.crt}}
		authorization: {mode: Webhook}
		tlsCertFile: $credentials/kubelet.crt
		tlsPrivateKeyFile: $credentials/kubelet.key
		staticPodPath: $state/manifests
		podLogsDir: $state/podlogs
		volumePluginDir: $state/kubelet/plugins-exec
		resolvConf: $state/resolv.conf
		failSwapOn: false
		oomScoreAdj: 0
		maxPods: 60
		evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
		imageGCHighThresholdPercent: 100
		makeIPTablesUtilChains: false
		syncFrequency: 10s
		volumeStatsAggPeriod: 10s
		configMapAndSecretChangeDetectionStrategy: Watch
		runtimeRequestTimeout: $([ -n "${MICROVM_TESTBED:-}" ] && echo 10 || echo 2)m
	Y
	up kubelet "$top/hack/keep.sh" kubelet --config="$state/kubelet.yaml" --kubeconfig="$credentials/kubelet.conf" --root-dir="$state/kubelet" \
		--cert-dir="$state/kubelet/pki" --hostname-override=$NODE --node-ip=$NODE_IP \
		--node-labels="microvm.io/ready=true,microvm.io/test-disk=$(disk)" --v="${KUBELET_V:-2}"
	# The limits of the connection table belong to the whole machine.
	up proxy kube-proxy --kubeconfig="$credentials/proxy.conf" --proxy-mode=nftables --cluster-cidr=$PODS --hostname-override=$NODE \
		--conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0 \
		--bind-address=$NODE_IP --healthz-bind-address= --metrics-bind-address=127.0.0.1:10249
}

is_ready() { [[ $(kubectl get node $NODE -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}') == True ]]; }

# ready: the limit is for an emulated machine, where everything takes its time.
ready() {
	local daemon=kubelet
	[ -f "$state/run/kubelet.pid" ] || daemon=apiserver # the node is another machine's
	wait_for 1500 $daemon is_ready || { kubectl describe node >&2; die "the node is not ready"; }
	kubectl apply -f "$top/deploy/k8s/runtimeclass.yaml" >/dev/null
}

start() {
	control
	node "$state/node"
	ready
}

stop() {
	local name
	# The kubelet first, or it would start again what containerd's end removes.
	down kubelet
	down proxy
	[ ! -d "$state/c" ] || "$top/hack/containerd.sh" stop "$state/c"
	for name in scheduler controller-manager apiserver etcd; do down $name; done
	awk -v s="$state/" 'index($5, s) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r m; do umount -l "$m"; done
	if [ -f "$state/disk" ]; then
		losetup -d "/dev/$(cat "$state/disk")"
		rm -f "$state/disk"
	fi
	for name in $SYSCTLS; do
		[ ! -f "$state/sysctl/${name//\//-}" ] || cat "$state/sysctl/${name//\//-}" >"/proc/sys/$name"
	done
	rm -rf "$state/sysctl"
	remove_cgroups
}

case $1 in
start) start ;;
control) control ;;
node) node "$(cd "${3:?node needs CREDENTIALS}" && pwd -P)" ;;
ready) ready ;;
stop) stop ;;
wipe) stop; rm -rf "$state" ;;
*) die "unknown command $1" ;;
esac
